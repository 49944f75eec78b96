"""The first stage of a worker: the template's models and the operator's script, before any engine starts.

Progress goes into `startup.detail`, a failure into `startup.error`, and then it is tried again, for as long as the
worker lives: what is on disk stays there, and a control plane that has enough of it ends the worker. It waits for
nothing but disk and network: not for an engine, not for an agent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.provision.provisioner import Provisioner
from comfyfleet.provision.template import ModelFile
from comfyfleet.wire.errors import FleetError
from comfyfleet.worker.agent.startup import Stage, Startup
from comfyfleet.worker.model_log import ModelLog
from comfyfleet.worker.script import ProvisioningScript

log = structlog.get_logger()

SHOW_EVERY_S = 1.0
RETRY_S = (5.0, 15.0, 30.0, 60.0)
_LINE = 120


class Provisioning:
    """`run` once; `done` is set when everything is there."""

    def __init__(
        self,
        *,
        provisioner: Provisioner,
        models: Sequence[ModelFile],
        script: ProvisioningScript | None,
        startup: Startup,
        model_log: ModelLog,
        clock: Clock,
        on_change: Callable[[str], None],
    ) -> None:
        self._provisioner = provisioner
        self._models = models
        self._script = script
        self._startup = startup
        self._model_log = model_log
        self._clock = clock
        self._on_change = on_change
        self.done = anyio.Event()

    async def run(self) -> None:
        tries = 0
        while not self.done.is_set():
            try:
                await self._once()
                self.done.set()
            except (FleetError, OSError) as failure:
                why = failure.message if isinstance(failure, FleetError) else str(failure)
                self._startup.fail(why)
                self._on_change(f"provisioning: {why}")
                log.error("provisioning.failed", why=why)
                self._model_log.line(f"[ERROR] provisioning: {why}")
                await self._clock.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
                tries += 1
        self._startup.recover()
        self._say("")

    async def _once(self) -> None:
        if self._models:
            plan = await self._provisioner.plan(self._models)
            if plan.work:
                log.info("provisioning.planned", files=len(plan.work), fetch_bytes=plan.fetch_bytes)
                try:
                    async with anyio.create_task_group() as showing:
                        showing.start_soon(self._show, name="download progress")
                        await self._provisioner.carry_out(plan)
                        showing.cancel_scope.cancel()
                except* FleetError as failures:
                    raise failures.exceptions[0] from failures
        if self._script is not None:
            self._say("running the provisioning script")
            await self._script.run(lambda line: self._say(f"provisioning script: {line[:_LINE]}"))

    async def _show(self) -> None:
        while True:
            self._say(self._provisioner.progress.describe(self._clock.monotonic()))
            await self._clock.sleep(SHOW_EVERY_S)

    def _say(self, detail: str) -> None:
        self._startup.recover()
        self._startup.enter(Stage.PROVISIONING, detail)
        self._on_change(f"provisioning: {detail}" if detail else "starting")

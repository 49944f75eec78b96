"""Somebody's own worker code in place of our agent: cloned at a ref, in its own environment, before our wrapper.

It reports for itself as soon as it runs. Until then, and when it keeps ending, this module sends the partial reports
that bootstrap scripts send: who, where and what is wrong. Its process dies with this one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import anyio
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.provision.checkout import checkout, make_venv, without_userinfo
from comfyfleet.provision.template import find_template
from comfyfleet.settings.agent import AgentSettings
from comfyfleet.settings.pyworker import PyworkerSettings
from comfyfleet.wire.errors import Fenced, FleetError, NotFound, ProvisionFailed
from comfyfleet.wire.workers import WorkerStatusReport
from comfyfleet.wire.workflow import Graph, read_graph
from comfyfleet.worker.agent.reporter import TIMEOUT
from comfyfleet.worker.agent.startup import Stage
from comfyfleet.worker.engines import process
from comfyfleet.worker.machine import Machine

log = structlog.get_logger()

FRAMEWORK = "vastai==1.9.1"
REPORT_EVERY_S = 2.0
RETRY_S = (1.0, 5.0, 15.0, 30.0)
_STEADY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Pyworker:
    """Run it beside the wrapper, instead of `Agent`. env: what the foreign process gets, plus what names its log."""

    settings: PyworkerSettings
    fleet: AgentSettings
    machine: Machine
    folder: Path
    env: Mapping[str, str]
    on_fenced: Callable[[], None]
    clock: Clock

    async def run(self) -> None:
        """Until cancelled."""
        tries = 0
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
            while True:
                began = self.clock.monotonic()
                try:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._report, session, name="bootstrap reports")
                        await self.machine.provisioning.done.wait()
                        command = await self.prepare()
                        tasks.cancel_scope.cancel()
                    await self._serve(command)
                except* (FleetError, OSError) as failures:
                    why = str(failures.exceptions[0])
                    log.error("pyworker.failed", why=why)
                    self.machine.startup.fail(why)
                    await self._post(session)
                tries = 0 if self.clock.monotonic() - began > _STEADY_S else tries + 1
                await self.clock.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])

    async def prepare(self) -> list[str]:
        """The command to run. Raises ProvisionFailed."""
        clone = self.folder / "pyworker"
        shown = without_userinfo(self.settings.repository)
        self.machine.startup.enter(Stage.ENGINE_START, f"cloning {shown}")
        commit = await checkout(self.settings.repository, self.settings.ref, clone)
        python = self.settings.python or str(await self._environment(clone))
        self._put_benchmark(clone)
        places = (clone / "worker.py", clone / "workers" / self.settings.backend / "worker.py")
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ProvisionFailed(
                f"{shown} has neither worker.py nor workers/{self.settings.backend}/worker.py",
                reason="pyworker",
            )
        log.info("pyworker.prepared", commit=commit, script=str(found.relative_to(clone)))
        return [python, str(found)]

    async def _environment(self, clone: Path) -> Path:
        """Its requirements, and the framework unless they bring it."""
        requirements = clone / "requirements.txt"
        wanted = ["-r", str(requirements)] if requirements.is_file() else []
        if "vastai" not in (requirements.read_text(encoding="utf-8") if wanted else ""):
            wanted.append(FRAMEWORK)
        self.machine.startup.enter(Stage.ENGINE_START, "installing the worker code's requirements")
        return await make_venv(self.folder / "pyworker-venv", sys.executable, wanted)

    def _put_benchmark(self, clone: Path) -> None:
        """The template's graph where the documents say, unless an operator's file is named."""
        home = clone / "workers" / "comfyui-json"
        if not home.is_dir():
            return
        graph: Graph | None = None
        if self.fleet.benchmark_json is not None and self.fleet.benchmark_json.is_file():
            graph = read_graph(self.fleet.benchmark_json.read_bytes(), field=self.fleet.benchmark_json.name)
        else:
            try:
                graph = find_template(self.fleet.template).benchmark_graph()
            except NotFound:
                return
        if graph is not None:
            (home / "misc").mkdir(exist_ok=True)
            (home / "misc" / "benchmark.json").write_text(json.dumps(graph, indent=2), encoding="utf-8")

    async def _serve(self, command: list[str]) -> None:
        """The process, to its end. Raises ProvisionFailed with its last words."""
        self.machine.startup.recover()
        clone = self.folder / "pyworker"
        env = {
            **self.env,
            "BACKEND": self.settings.backend,
            "MODEL_LOG": str(self.machine.model_log.path),
            "PYTHONPATH": os.pathsep.join(part for part in (self.env.get("PYTHONPATH", ""), str(clone)) if part),
            "PYTHONUNBUFFERED": "1",
        }
        child = await process.start(command, env=env, cwd=clone, log_path=self.folder / "logs" / "pyworker.log")
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child.read_log, name="pyworker log")
                code = await child.process.wait()
                with anyio.move_on_after(0.5):
                    await child.log_ended.wait()
                tasks.cancel_scope.cancel()
        finally:
            await child.stop()
        raise ProvisionFailed(f"the worker code ended with code {code}: {child.last_words()}", reason="pyworker")

    async def _report(self, session: aiohttp.ClientSession) -> None:
        while True:
            await self._post(session)
            await self.clock.sleep(REPORT_EVERY_S)

    async def _post(self, session: aiohttp.ClientSession) -> None:
        startup = self.machine.startup
        report = WorkerStatusReport(
            id=self.fleet.worker_id,
            mtoken=self.fleet.mtoken,
            url=self.fleet.url,
            error_msg=startup.error,
            incarnation=self.fleet.incarnation,
            stage=startup.stage.value,
            stage_detail=startup.detail,
        )
        for base in self.fleet.report_urls:
            try:
                async with session.post(
                    f"{base}/worker_status/",
                    data=msgspec.json.encode(report),
                    headers={"Content-Type": "application/json"},
                ) as answer:
                    if answer.status // 100 == 2:
                        return
                    if answer.status == Fenced.status:
                        self.on_fenced()
            except (aiohttp.ClientError, OSError, TimeoutError) as problem:
                log.debug("report.failed", why=str(problem) or type(problem).__name__)

"""What a worker's machine does beside its jobs: gets what is needed, keeps room, reads its cards, tells its log.

Built once by the composition root. Engines start after `provisioning.done`; nothing here waits for an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from comfyfleet.clock import Clock
from comfyfleet.gpu import GpuFacts, gpu_facts
from comfyfleet.ids import Ids
from comfyfleet.provision.clean import Rule
from comfyfleet.provision.progress import Progress
from comfyfleet.provision.provisioner import Provisioner
from comfyfleet.provision.template import Template, find_template
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.settings.provision import ProvisionSettings
from comfyfleet.settings.worker import WorkerSettings
from comfyfleet.wire.errors import BadRequest, NotFound
from comfyfleet.worker.agent.startup import Startup
from comfyfleet.worker.engines.pool import EngineSlot, EngineState
from comfyfleet.worker.housekeeping import CleanedFolders, Housekeeping
from comfyfleet.worker.model_log import ModelLog
from comfyfleet.worker.provisioning import Provisioning
from comfyfleet.worker.script import ProvisioningScript
from comfyfleet.worker.service import JobService
from comfyfleet.worker.stages.kit import Kit

_CARDS_EVERY_S = 10.0


@dataclass(kw_only=True)
class Cards:
    """The cards as last read."""

    facts: list[GpuFacts] = field(default_factory=list)

    async def watch(self, clock: Clock) -> None:
        """Until cancelled; a machine without cards is asked once."""
        while True:
            self.facts = await anyio.to_thread.run_sync(gpu_facts)
            if not self.facts:
                return
            await clock.sleep(_CARDS_EVERY_S)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Parts that `run` keeps going."""

    startup: Startup
    provisioning: Provisioning
    model_log: ModelLog
    housekeeping: Housekeeping
    cards: Cards
    clock: Clock
    service: JobService

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.provisioning.run, name="provisioning")
            tasks.start_soon(self.housekeeping.run, name="housekeeping")
            tasks.start_soon(self.cards.watch, self.clock, name="cards")
            tasks.start_soon(
                self.model_log.tell, self.clock, lambda: self.service.is_ready, self.service.trouble, name="model log"
            )


def build_machine(
    settings: WorkerSettings,
    env: Mapping[str, str],
    *,
    service: JobService,
    slots: Sequence[EngineSlot],
    kit: Kit,
    kept_folders: Callable[[], set[str]],
    clock: Clock,
    ids: Ids,
) -> Machine:
    """Raises BadRequest naming a variable that cannot be read."""
    folders = settings.folders
    try:
        own = ProvisionSettings.from_environment(env, folders.worker_dir)
    except ValueError as problem:
        raise BadRequest(str(problem)) from problem
    startup, model_log = Startup(clock=clock), ModelLog(own.model_log)
    template = _template(own.template)
    models = template.models if template is not None else ()

    def show(reason: str) -> None:
        for slot in slots:
            if slot.state is EngineState.STARTING:
                slot.reason = reason

    script = None
    if own.script:
        given = {**env, "WORKSPACE": own.workspace or str(folders.data_dir), "MODEL_LOG": str(own.model_log)}
        script = ProvisioningScript(
            where=own.script, folder=folders.worker_dir, env=given, fetcher=kit.fetcher, model_log=model_log
        )
    return Machine(
        startup=startup,
        provisioning=Provisioning(
            provisioner=Provisioner(
                settings=own.sources,
                models_dir=folders.models_dir,
                clock=clock,
                ids=ids,
                limits=TransferLimits(reserve_bytes=own.min_free_bytes),
                progress=Progress(),
            ),
            models=models,
            script=script,
            startup=startup,
            model_log=model_log,
            clock=clock,
            on_change=show,
        ),
        model_log=model_log,
        housekeeping=Housekeeping(
            service,
            CleanedFolders(
                output=folders.output_dir,
                engine=_engine_folders(folders.worker_dir),
                models=folders.models_dir,
                template_models=frozenset(model.name for model in models),
            ),
            Rule(
                min_free_bytes=own.min_free_bytes,
                old_after_s=own.old_after_s,
                models_budget_bytes=own.models_budget_bytes,
            ),
            kept_folders=kept_folders,
            clock=clock,
        ),
        cards=Cards(),
        clock=clock,
        service=service,
    )


def _engine_folders(worker_dir: Path) -> tuple[Path, ...]:
    return (worker_dir / "engine",)


def _template(name: str) -> Template | None:
    """None for one that is not the package's: a control plane can have templates that only set variables."""
    try:
        return find_template(name)
    except NotFound:
        return None

"""Carry a template's plan out: room first, then a few files at a time, with progress that anybody may look at."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import anyio

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.provision.download import Downloader
from comfyfleet.provision.plan import Plan, check_room, make_plan
from comfyfleet.provision.progress import FileProgress, Progress
from comfyfleet.provision.template import ModelFile
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.version import __version__
from comfyfleet.wire.errors import FleetError

FILES_AT_ONCE = 3
READ_BUFFER_BYTES = 512 * 1024  # aiohttp stops and resumes reading at this, and each time costs


@dataclass(kw_only=True)
class Provisioner:
    """`plan`, then `carry_out`. Use `progress` from another task meanwhile."""

    settings: SourceSettings
    models_dir: Path
    clock: Clock
    ids: Ids
    limits: TransferLimits
    progress: Progress

    async def plan(self, models: Sequence[ModelFile]) -> Plan:
        """Sizes that the template lacks are asked of the sources."""
        async with self._session() as session:
            downloader = self._downloader(session)
            sized = [replace(model, size_bytes=await downloader.size(model)) for model in models]
        plan = make_plan(sized, self.models_dir)
        # A size that only a source told serves the plan; the download takes the file as its source has it then.
        own = {model.relative_path: model for model in models}
        return Plan(steps=tuple(replace(step, model=own[step.model.relative_path]) for step in plan.steps))

    async def carry_out(self, plan: Plan) -> None:
        """Every file at its place. Raises DiskFull before the first byte, ProvisionFailed naming file and reason."""
        check_room(plan.work, self.models_dir, reserve_bytes=self.limits.reserve_bytes)
        work = deque[tuple[ModelFile, FileProgress]]()
        self.progress.files.clear()
        for step in plan.work:
            size_bytes = step.model.size_bytes or step.fetch_bytes or 0
            file = FileProgress(name=step.model.name, size_bytes=size_bytes)
            file.done_bytes = max(0, size_bytes - (step.fetch_bytes or 0)) if size_bytes else 0
            self.progress.files.append(file)
            work.append((step.model, file))

        async with self._session() as session:
            downloader = self._downloader(session)

            async def lane() -> None:
                while work:
                    model, file = work.popleft()
                    await downloader.fetch(model, self.models_dir, file)

            try:
                async with anyio.create_task_group() as lanes:
                    for number in range(min(FILES_AT_ONCE, len(work))):
                        lanes.start_soon(lane, name=f"lane {number}")
            except* FleetError as several:
                raise the_error_in(several) from several

    def _downloader(self, session: aiohttp.ClientSession) -> Downloader:
        return Downloader(self.settings, session=session, clock=self.clock, ids=self.ids, limits=self.limits)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": f"comfyfleet/{__version__}", "Accept-Encoding": "identity"},
            read_bufsize=READ_BUFFER_BYTES,
        )


def the_error_in(group: BaseExceptionGroup[FleetError]) -> FleetError:
    """The first failure stands for those that it caused in its neighbours."""
    first = group.exceptions[0]
    return the_error_in(first) if isinstance(first, BaseExceptionGroup) else first

"""Bring one model file to its place: one process at a time, from one source after another, checked, then renamed.

How its bytes arrive is `transfer`'s; what is staged and for how long, `staging`'s. Never is a partial or wrong file
under a final name: the name is given last, after size, digest and header were checked and everything is on disk.
"""

from __future__ import annotations

from pathlib import Path

import aiohttp
import anyio.to_thread
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.provision.checks import check_header
from comfyfleet.provision.lock import locked
from comfyfleet.provision.offline import copy_from
from comfyfleet.provision.plan import Verb, decide, look
from comfyfleet.provision.progress import FileProgress
from comfyfleet.provision.ranges import Pauses, Remote, SourceChanged
from comfyfleet.provision.sources import Source, sources_of
from comfyfleet.provision.staging import Staged, disk_trouble_told, lock_path, staged
from comfyfleet.provision.template import ModelFile
from comfyfleet.provision.transfer import Received, Transfer, TransferLimits
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.wire.errors import ProvisionFailed

log = structlog.get_logger()


class Downloader:
    """One for all files of a process: a host that asks for a pause gets it from every download."""

    def __init__(
        self,
        settings: SourceSettings,
        *,
        session: aiohttp.ClientSession,
        clock: Clock,
        ids: Ids,
        limits: TransferLimits | None = None,
    ) -> None:
        self._settings = settings
        self._session = session
        self._clock = clock
        self._ids = ids
        self._limits = limits or TransferLimits()
        self._pauses = Pauses()

    async def size(self, model: ModelFile) -> int | None:
        """What the template says, else what the first source that answers says."""
        if model.size_bytes is not None or self._settings.offline_dir is not None:
            return model.size_bytes
        for source in sources_of(model, self._settings):
            if size_bytes := await self._remote(source).size():
                return size_bytes
        return None

    async def fetch(self, model: ModelFile, models_dir: Path, progress: FileProgress) -> Path:
        """The file at its final place. Raises ProvisionFailed when a source or the disk fails, DiskFull."""
        target = models_dir / model.relative_path
        with disk_trouble_told(target, model.size_bytes or 0):  # what the network does to us has names of its own
            await self._fetch(model, models_dir, target, progress)
        return target

    async def _fetch(self, model: ModelFile, models_dir: Path, target: Path, progress: FileProgress) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)

        def waiting() -> None:
            progress.note = f"another process downloads {model.name}"

        async with locked(lock_path(target), self._clock, on_wait=waiting):
            progress.note = ""
            if decide(model, look(model, models_dir)).verb is not Verb.KEEP:
                async with staged(target) as file:
                    await self._obtain(model, file, progress)
            progress.size_bytes = progress.done_bytes = target.stat().st_size
            progress.is_finished = True

    async def _obtain(self, model: ModelFile, file: Staged, progress: FileProgress) -> None:
        if self._settings.offline_dir is not None:
            digest = await copy_from(self._settings.offline_dir, model, file)
            await self._finish(model, Received(sha256=digest, published_sha256=""), file)
            return
        failures: list[str] = []
        for source in sources_of(model, self._settings):
            try:
                await self._from(source, model, file, progress)
                return
            except ProvisionFailed as failure:
                if failure.details.get("reason") == "disk":
                    raise  # no other source would change that
                failures.append(failure.message)
                log.warning("download.source_failed", file=model.name, why=failure.message)
        raise ProvisionFailed(f"{model.name}: {'; '.join(dict.fromkeys(failures))}", file=model.name)

    async def _from(self, source: Source, model: ModelFile, file: Staged, progress: FileProgress) -> None:
        """From one source. A file that changed there, or came out wrong of an older beginning, starts once afresh."""
        for is_last in (False, True):
            is_resumed = file.ledger is not None
            began = self._clock.monotonic()
            try:
                received = await Transfer(
                    self._remote(source),
                    model,
                    file,
                    progress,
                    limits=self._limits,
                    clock=self._clock,
                    ids=self._ids,
                ).run()
                await self._finish(model, received, file)
            except SourceChanged as changed:
                file.forget()
                if is_last:
                    raise ProvisionFailed("the file changes at its source", file=model.name) from changed
                continue
            except WrongFile:
                file.forget()
                if is_last or not is_resumed:
                    raise
                continue
            seconds = self._clock.monotonic() - began
            log.info(
                "download.finished",
                file=model.name,
                size_bytes=file.target.stat().st_size,
                fetched_bytes=progress.fetched_bytes,
                seconds=round(seconds, 1),
                sha256=received.sha256,
            )
            return

    async def _finish(self, model: ModelFile, received: Received, file: Staged) -> None:
        """Checks, then the final name. Raises WrongFile."""
        size_bytes = file.path.stat().st_size
        if size_bytes == 0:
            raise WrongFile("the source's file is empty", file=model.name, reason="size")
        if model.size_bytes is not None and size_bytes != model.size_bytes:
            raise WrongFile(f"{size_bytes} bytes came, not {model.size_bytes}", file=model.name, reason="size")
        expected = model.sha256 or received.published_sha256
        if expected and received.sha256 != expected:
            raise WrongFile(f"the SHA-256 is {received.sha256}, not {expected}", file=model.name, reason="sha256")
        try:
            check_header(file.path, model.name)
        except ProvisionFailed as failure:
            raise WrongFile(failure.message, **failure.details) from failure
        await anyio.to_thread.run_sync(file.finish)

    def _remote(self, source: Source) -> Remote:
        return Remote(
            source.url,
            settings=self._settings,
            session=self._session,
            clock=self._clock,
            pauses=self._pauses,
            idle_s=self._limits.idle_s,
        )


class WrongFile(ProvisionFailed):
    """All bytes came, and they are not the file that was wanted."""

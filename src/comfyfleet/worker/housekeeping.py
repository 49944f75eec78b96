"""Keep room on the disk: look now and then, clean by the rule of `provision.clean`, refuse work while it is full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
import structlog

from comfyfleet.clock import Clock
from comfyfleet.provision.clean import (
    Cleaned,
    Rule,
    candidates,
    drop_empty_folders,
    files_in,
    make_room,
    models_in,
    models_to_drop,
    remove,
)
from comfyfleet.provision.progress import size
from comfyfleet.provision.staging import free_bytes
from comfyfleet.wire.errors import DiskFull
from comfyfleet.wire.shapes import models_of
from comfyfleet.worker.service import JobService

log = structlog.get_logger()

LOOK_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class CleanedFolders:
    """output: one folder a job; engine: what engines keep for themselves. template_models: names that never go."""

    output: Path
    engine: Sequence[Path]
    models: Path
    template_models: frozenset[str] = frozenset()

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.output, *self.engine)


def clean(
    folders: CleanedFolders,
    rule: Rule,
    *,
    now: float,
    kept: Iterable[str] | None = (),
    models_in_use: Iterable[str] = (),
) -> Cleaned:
    """One round. kept: names of output folders whose files stay; None: not known, no output goes. Blocking."""
    if kept is not None and free_bytes(folders.output) < rule.min_free_bytes:
        kept_folders = {folders.output / name for name in kept}
        going = candidates(
            files_in(folders.all), rule, now=now, is_kept=lambda path: not kept_folders.isdisjoint(path.parents)
        )
        cleaned = make_room(going, rule, folders.output)
        drop_empty_folders(folders.all, now=now, old_after_s=rule.old_after_s)
    else:
        cleaned = Cleaned(removed=(), free_bytes=free_bytes(folders.output), is_full=False)
    used = {Path(name).name for name in models_in_use} | folders.template_models
    models = models_in(folders.models) if rule.models_budget_bytes else []
    dropped = models_to_drop(models, rule.models_budget_bytes, is_kept=lambda path: path.name in used)
    gone = tuple(model.path for model in dropped if remove(model.path))
    return Cleaned(removed=(*cleaned.removed, *gone), free_bytes=cleaned.free_bytes, is_full=cleaned.is_full)


class Housekeeping:
    """`run` beside the service."""

    def __init__(
        self,
        service: JobService,
        folders: CleanedFolders,
        rule: Rule,
        *,
        kept_folders: Callable[[], set[str]],
        clock: Clock,
    ) -> None:
        self._service = service
        self._kept_folders = kept_folders
        self._folders = folders
        self._rule = rule
        self._clock = clock

    async def run(self) -> None:
        while True:
            try:
                await self.look_once()
            except OSError as problem:  # the loop's boundary: the next look may see more
                log.warning("cleanup.failed", why=str(problem))
            await self._clock.sleep(LOOK_EVERY_S)

    async def look_once(self) -> None:
        # Only a full disk asks for the list of all that is kept: it is long, and read and held for nothing otherwise.
        is_short = free_bytes(self._folders.output) < self._rule.min_free_bytes
        kept = self._kept_folders() if is_short else None
        used, now = self._models_in_use(), self._clock.now()
        cleaned = await anyio.to_thread.run_sync(
            lambda: clean(self._folders, self._rule, now=now, kept=kept, models_in_use=used)
        )
        if cleaned.removed:
            log.info("cleanup.finished", files=len(cleaned.removed), free_bytes=cleaned.free_bytes)
        self._service.facts["cleanup"] = {
            "rule": self._rule.sentence(),
            "free_bytes": cleaned.free_bytes,
            "is_full": cleaned.is_full,
        }
        if cleaned.is_full == (self._service.refusal is not None):
            return
        self._service.refusal = disk_is_full(cleaned.free_bytes, self._rule) if cleaned.is_full else None
        log.warning("disk.full" if cleaned.is_full else "disk.has_room", free_bytes=cleaned.free_bytes)

    def _models_in_use(self) -> set[str]:
        return {name for graph in self._service.live_graphs() for name in models_of(graph)}


def disk_is_full(free: int, rule: Rule) -> DiskFull:
    return DiskFull(
        f"the disk is full: {size(free)} free, {size(rule.min_free_bytes)} needed, and nothing more may be removed",
        free_bytes=free,
        needed_bytes=rule.min_free_bytes,
    )

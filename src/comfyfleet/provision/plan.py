"""What a template needs against what is on disk: the steps left, in bytes. Pure, but for `look`, which looks.

A whole file that differs from the template's is the user's own and stays; one that is cut off or broken is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from comfyfleet.provision.checks import check_header
from comfyfleet.provision.progress import size
from comfyfleet.provision.staging import free_bytes, staged_bytes
from comfyfleet.provision.template import ModelFile
from comfyfleet.wire.errors import DiskFull, ProvisionFailed


class Verb(StrEnum):
    KEEP = "keep"
    DOWNLOAD = "download"
    RESUME = "resume"
    REPLACE = "replace"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is on disk for one model. size_bytes None: no file. problem: why the file is no whole model, or ""."""

    size_bytes: int | None = None
    problem: str = ""
    has_header: bool = False  # its own header vouches for its length
    staged_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to do for one model. fetch_bytes None: nobody said how large the file is."""

    model: ModelFile
    verb: Verb
    fetch_bytes: int | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps in the template's order."""

    steps: tuple[Step, ...]

    @property
    def work(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.verb is not Verb.KEEP)

    @property
    def fetch_bytes(self) -> int:
        """What is known to be left; steps of unknown size count as nothing."""
        return sum(step.fetch_bytes or 0 for step in self.steps)

    def lines(self) -> list[str]:
        """One a step, and the sum."""
        if not self.steps:
            return ["no model files are needed"]
        lines = []
        for step in self.steps:
            amount = "size unknown" if step.fetch_bytes is None else size(step.fetch_bytes)
            tail = f"  ({step.note})" if step.note else ""
            what = "" if step.verb is Verb.KEEP else f"  {amount}"
            lines.append(f"{step.verb:<8} {step.model.relative_path}{what}{tail}")
        unknown = sum(step.fetch_bytes is None for step in self.work)
        more = f" and {unknown} of unknown size" if unknown else ""
        lines.append(
            f"{len(self.work)} of {len(self.steps)} files to fetch, {size(self.fetch_bytes)}"
            f" ({self.fetch_bytes} bytes){more}"
        )
        return lines


def decide(model: ModelFile, found: Found) -> Step:
    """The one step that brings `model` from what was found to what is wanted."""
    left = None if model.size_bytes is None else model.size_bytes - found.staged_bytes
    fetch = Verb.RESUME if found.staged_bytes else Verb.DOWNLOAD
    if found.size_bytes is None:
        return Step(model=model, verb=fetch, fetch_bytes=left)
    if found.problem:
        return Step(model=model, verb=Verb.REPLACE, fetch_bytes=left, note=found.problem)
    if model.size_bytes is None or found.size_bytes == model.size_bytes:
        return Step(model=model, verb=Verb.KEEP, fetch_bytes=0)
    if found.has_header or found.size_bytes > model.size_bytes:
        note = f"a whole file of {found.size_bytes} bytes; the template's has {model.size_bytes}"
        return Step(model=model, verb=Verb.KEEP, fetch_bytes=0, note=note)
    note = f"cut off: {found.size_bytes} of {model.size_bytes} bytes"
    return Step(model=model, verb=Verb.REPLACE, fetch_bytes=left, note=note)


def make_plan(models: Iterable[ModelFile], models_dir: Path) -> Plan:
    """The plan for what is on disk now."""
    return Plan(steps=tuple(decide(model, look(model, models_dir)) for model in models))


def look(model: ModelFile, models_dir: Path) -> Found:
    """What is at a model's place, and what of it is staged."""
    target = models_dir / model.relative_path
    staged = staged_bytes(target)
    if not target.is_file():
        return Found(staged_bytes=staged)
    problem = ""
    try:
        check_header(target, model.name)
    except ProvisionFailed as failure:
        problem = failure.message
    return Found(
        size_bytes=target.stat().st_size,
        problem=problem,
        has_header=not problem and target.suffix in (".safetensors", ".sft"),
        staged_bytes=staged,
    )


def check_room(steps: Sequence[Step], models_dir: Path, *, reserve_bytes: int) -> None:
    """Raises DiskFull when what is known to be fetched does not fit on the disk it goes to."""
    needed: dict[int, tuple[int, Path]] = {}
    for step in steps:
        folder = models_dir / step.model.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        device = folder.stat().st_dev
        before, _ = needed.get(device, (0, folder))
        needed[device] = (before + (step.fetch_bytes or 0), folder)
    for needed_bytes, folder in needed.values():
        free = free_bytes(folder)
        if needed_bytes and needed_bytes + reserve_bytes > free:
            raise DiskFull(
                f"the models need {size(needed_bytes)} more, the disk has {size(free)} free"
                f" and {size(reserve_bytes)} stay free",
                needed_bytes=needed_bytes,
                free_bytes=free,
                reserve_bytes=reserve_bytes,
            )

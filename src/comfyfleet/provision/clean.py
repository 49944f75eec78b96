"""Free disk space by a stated rule. `candidates` and `models_to_drop` decide, `make_room` and `drop` act.

The rule: when less than a minimum is free on the output disk, files older than a day go, oldest first, until there is
room; never one of a job that runs or whose result is still kept. Models go by least recent use, only above a budget.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from comfyfleet.provision.progress import size
from comfyfleet.provision.staging import free_bytes

DAY_S = 24 * 3600.0
_MODEL_SUFFIXES = frozenset({".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf"})


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One file. used_at: last written or, for models, last read as far as the file system tells (epoch s)."""

    path: Path
    size_bytes: int
    used_at: float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When and what. models_budget_bytes 0: models never go."""

    min_free_bytes: int
    old_after_s: float = DAY_S
    models_budget_bytes: int = 0

    def sentence(self) -> str:
        """The rule as `/health` states it."""
        budget = (
            f" Models go by least recent use above {size(self.models_budget_bytes)}."
            if self.models_budget_bytes
            else " Models stay."
        )
        return (
            f"Below {size(self.min_free_bytes)} free, files older than {self.old_after_s / 3600:g} hours go, oldest"
            f" first, until there is room; never one of a running or unread job.{budget}"
        )


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What a round did. is_full: there is still less free than the rule asks for."""

    removed: tuple[Path, ...]
    free_bytes: int
    is_full: bool


def candidates(files: Iterable[Stored], rule: Rule, *, now: float, is_kept: Callable[[Path], bool]) -> list[Stored]:
    """What may go, oldest first."""
    old = [file for file in files if now - file.used_at > rule.old_after_s and not is_kept(file.path)]
    return sorted(old, key=lambda file: (file.used_at, file.path))


def models_to_drop(models: Sequence[Stored], budget_bytes: int, *, is_kept: Callable[[Path], bool]) -> list[Stored]:
    """The least recently used models whose going brings all of them within the budget; [] for a budget of 0."""
    over = sum(model.size_bytes for model in models) - budget_bytes if budget_bytes else 0
    dropped = []
    for model in sorted(models, key=lambda model: (model.used_at, model.path)):
        if over <= 0:
            break
        if not is_kept(model.path):
            dropped.append(model)
            over -= model.size_bytes
    return dropped


def files_in(folders: Iterable[Path]) -> list[Stored]:
    """Every plain file below `folders`; links are not followed."""
    found = []
    for path in _walk(folders):
        try:
            status = path.stat(follow_symlinks=False)
        except OSError:
            continue  # gone meanwhile
        found.append(Stored(path=path, size_bytes=status.st_size, used_at=status.st_mtime))
    return found


def models_in(folder: Path) -> list[Stored]:
    """Model files below `folder`; one that is being downloaded is none."""
    found = []
    for path in _walk([folder]):
        if path.suffix.lower() in _MODEL_SUFFIXES and not path.name.startswith("."):
            status = path.stat()
            used_at = max(status.st_atime, status.st_mtime)
            found.append(Stored(path=path, size_bytes=status.st_size, used_at=used_at))
    return found


def make_room(going: Sequence[Stored], rule: Rule, disk: Path, *, free: Callable[[Path], int] = free_bytes) -> Cleaned:
    """Remove in order until the disk of `disk` has room. A file with more links frees nothing until the last goes."""
    removed = []
    for file in going:
        if free(disk) >= rule.min_free_bytes:
            break
        if remove(file.path):
            removed.append(file.path)
    left = free(disk)
    return Cleaned(removed=tuple(removed), free_bytes=left, is_full=left < rule.min_free_bytes)


def remove(path: Path) -> bool:
    """Remove a file; False when it was gone already or may not go."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def drop_empty_folders(roots: Iterable[Path], *, now: float, old_after_s: float) -> None:
    """Folders below `roots` that are empty and old; a new one may be about to be filled."""
    for root in roots:
        for where, _, _ in os.walk(root, topdown=False):
            folder = Path(where)
            try:
                if folder != root and now - folder.stat().st_mtime > old_after_s:
                    folder.rmdir()
            except OSError:
                continue  # not empty, or gone


def _walk(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                yield Path(where) / name

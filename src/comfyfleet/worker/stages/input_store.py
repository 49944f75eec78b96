"""The engine's input folder, seen as a store by content: one file per digest, whoever sent it and under what name.

Files appear under their name only when whole. The least recently used ones go when the folder is over its size;
nothing younger than `KEEP_S` goes, since a job may be about to read it. Blocking; callers use a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from comfyfleet.clock import Clock

FOLDER = "comfyfleet"
DRAFT = ".part-"
KEEP_S = 6 * 3600.0
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,12}")


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file that the engine can load: `name` goes into the graph; `path` is for engines elsewhere."""

    name: str
    path: Path
    sha256: str
    size_bytes: int


class InputStore:
    """Files under `<input folder>/comfyfleet/<digest><suffix>`."""

    def __init__(self, input_folder: Path, clock: Clock, *, max_bytes: int) -> None:
        self._folder = input_folder / FOLDER
        self._clock = clock
        self._max_bytes = max_bytes

    def draft(self) -> tuple[BinaryIO, Path]:
        """An open file to write into; give it to `keep` or `drop`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=DRAFT)
        return os.fdopen(handle, "w+b"), Path(name)

    def keep(self, draft: Path, *, sha256: str, suffix: str) -> InputFile:
        """Name a whole file by its content; one that is there already is used instead."""
        safe = suffix.lower() if _SUFFIX.fullmatch(suffix) else ""
        path = self._folder / f"{sha256[:40]}{safe}"
        size = draft.stat().st_size
        os.chmod(draft, 0o644)
        os.replace(draft, path)
        self._touch(path)
        return InputFile(name=f"{FOLDER}/{path.name}", path=path, sha256=sha256, size_bytes=size)

    def drop(self, draft: Path) -> None:
        draft.unlink(missing_ok=True)

    def find(self, name: str) -> InputFile | None:
        """A kept file by its name, marked as used; None when it is gone."""
        path = self._folder / name.rpartition("/")[2]
        try:
            size = path.stat().st_size
            self._touch(path)
        except FileNotFoundError:
            return None
        return InputFile(name=f"{FOLDER}/{path.name}", path=path, sha256=path.stem, size_bytes=size)

    def prune(self) -> int:
        """Drop what is over the size, oldest first; returns how many files went."""
        if not self._folder.is_dir():
            return 0
        entries = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another job's draft that was just named
                facts = entry.stat()
                entries.append((facts.st_mtime, facts.st_size, entry.path))
        gone = evictable(entries, self._max_bytes, self._clock.now())
        for path in gone:
            Path(path).unlink(missing_ok=True)
        return len(gone)

    def _touch(self, path: Path) -> None:
        now = self._clock.now()
        os.utime(path, (now, now))


def evictable(entries: list[tuple[float, int, str]], max_bytes: int, now: float) -> list[str]:
    """Of (last used, size, path): the oldest ones to drop so that the rest fits, none of them used within KEEP_S.

    Drafts of that age belong to a process that died, and go in any case.
    """
    total = sum(size for _, size, _ in entries)
    gone = []
    for used_at, size, path in sorted(entries):
        if now - used_at < KEEP_S:
            break
        if total <= max_bytes and not os.path.basename(path).startswith(DRAFT):
            continue
        gone.append(path)
        total -= size
    return gone

"""One file of an engine, kept: put under its new name, hashed, and looked at. Blocking; constant memory.

A small file is read once, for all that is to be done with it; a large one is linked and read as a stream.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from comfyfleet.storage.drafts import Drafts
from comfyfleet.storage.local import place
from comfyfleet.worker.stages.media import MediaFacts, media_facts, peaks, poster

POSTER_SUFFIX = ".poster.jpg"
# Below this, copying costs less than the care that a shared inode needs.
COPY_BELOW_BYTES = 4 * 1024 * 1024
_QUICK_BYTES = 128 * 1024
_QUICK_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_HASH_BYTES = 1024 * 1024
_HAS_PROC = os.path.isdir("/proc/self/fd")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """What is known of a kept file. peaks: of a sound, for drawing it."""

    size_bytes: int
    sha256: str
    facts: MediaFacts
    has_poster: bool
    peaks: list[float] | None


def is_quick(source: str | None) -> bool:
    """A picture so small that the way to a thread and back costs more than the work (half a millisecond)."""
    if source is None or not source.lower().endswith(_QUICK_SUFFIXES):
        return False
    return os.stat(source).st_size <= _QUICK_BYTES


def keep(
    source: str | None, text: str | None, target: str, *, folder: Path | None, drafts: Drafts, copy: bool
) -> StoredFile:
    """Place one file at `target` and look at it. Blocking; raises OSError.

    folder: what `source` must really be in. drafts: where small files are written first.
    """
    data = text.encode() if text is not None else None
    size = 0
    if data is None and source is not None and folder is not None:
        handle, real, size = _opened(source, folder)
        try:
            if size < COPY_BELOW_BYTES:
                data = _whole(handle, size)
            else:
                place(Path(real), Path(target), copy)
        finally:
            os.close(handle)
    if data is not None:  # small: read once, for all that is to be done with it
        drafts.place(data, target)
        size = len(data)
    facts = media_facts(target, data)
    has_poster = facts.kind == "video" and _keep_poster(target, drafts)
    return StoredFile(
        size_bytes=size,
        sha256=hashlib.sha256(data).hexdigest() if data is not None else _sha256(target),
        facts=facts,
        has_poster=has_poster,
        peaks=peaks(target, facts.duration_s) if facts.kind == "audio" else None,
    )


def _keep_poster(film: str, drafts: Drafts) -> bool:
    """Put a still beside the film; False where there is none to be had, or its name would be too long."""
    picture = poster(film)
    if picture is None:
        return False
    try:
        drafts.place(picture, poster_path(film))
    except OSError as problem:
        if problem.errno != errno.ENAMETOOLONG:
            raise
        return False
    return True


def _opened(source: str, folder: Path) -> tuple[int, str, int]:
    """A handle, the file's real path and its size. Raises FileNotFoundError for what a link leads out of `folder`."""
    handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not keep us waiting for its writer
    try:
        facts = os.fstat(handle)
        # Of the very file that is open; asking by its name again costs a look at each folder on the way.
        real = os.readlink(f"/proc/self/fd/{handle}") if _HAS_PROC else os.path.realpath(source, strict=True)
        if not stat.S_ISREG(facts.st_mode) or not real.startswith(_real_folder(folder)):
            raise FileNotFoundError(os.path.basename(source))
    except BaseException:
        os.close(handle)
        raise
    return handle, real, facts.st_size


def _whole(handle: int, size: int) -> bytes:
    parts = []
    while part := os.read(handle, size + 1):
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@lru_cache(maxsize=256)
def _real_folder(folder: Path) -> str:
    """The folder's real path with its slash; an engine's folders do not move while it runs."""
    return os.path.join(os.path.realpath(folder), "")


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_HASH_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def poster_path(path: str) -> str:
    """Where the still of a film is kept: beside it."""
    return path + POSTER_SUFFIX

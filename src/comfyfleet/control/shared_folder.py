"""A data directory that several control planes of one machine may share: who uses which file, and whose turn it is.

Locks are the kernel's, on open files: a process that dies leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from comfyfleet.clock import Clock

_TURN_POLL_S = 0.05


class NotOurTurn(Exception):
    """Another process keeps the folder for itself, and does not let go."""


def own_file(folder: Path, stem: str, suffix: str) -> tuple[Path, int]:
    """(a file that no other living process was given, the descriptor that keeps it ours until it is closed).

    The first is `<stem><suffix>`; a second process gets `<stem>-2<suffix>`. Whoever starts next continues a dead one's.
    """
    number = 1
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        descriptor = os.open(folder / f".{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        if _locked(descriptor):
            return folder / f"{name}{suffix}", descriptor
        os.close(descriptor)
        number += 1


@asynccontextmanager
async def our_turn(path: Path, clock: Clock, at_most_s: float) -> AsyncIterator[None]:
    """One process at a time inside. Raises NotOurTurn after that long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        until = clock.monotonic() + at_most_s
        while not _locked(descriptor):
            if clock.monotonic() >= until:
                raise NotOurTurn(str(path))
            await clock.sleep(_TURN_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

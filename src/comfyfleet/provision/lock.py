"""One process at a time per file: an advisory lock beside it, held by the kernel and so never left behind by a kill."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from comfyfleet.clock import Clock

_POLL_S = 0.2


@asynccontextmanager
async def locked(path: Path, clock: Clock, *, on_wait: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
    """Hold `path`'s lock; the file goes with the last holder."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            on_wait()
            await clock.sleep(_POLL_S)
            continue
        # The former holder removed the name while we waited for it: what we hold locks nobody out.
        if os.fstat(fd).st_nlink == 0:
            os.close(fd)
            continue
        break
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)

"""The log that foreign agents wait on: `BACKENDS_READY` when engines take work, `BACKEND_UNRECOVERABLE` if none will.

A PyWorker reads it from its beginning and takes any line for news, so a start moves the former file to `.old`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comfyfleet.clock import Clock

READY = "BACKENDS_READY"
UNRECOVERABLE = "BACKEND_UNRECOVERABLE"
_POLL_S = 0.25


class ModelLog:
    """Append-only for one start of a worker."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name(path.name + ".old"))
        path.touch()

    def line(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text.rstrip("\n") + "\n")

    async def tell(self, clock: Clock, is_ready: Callable[[], bool], trouble: Callable[[], str]) -> None:
        """Until cancelled: a line at each change for the better or for good."""
        told = ""
        while True:
            why = trouble()
            now = READY if is_ready() else f"{UNRECOVERABLE}: {why}" if why else told
            if now != told:
                told = now
                self.line(now)
            await clock.sleep(_POLL_S)

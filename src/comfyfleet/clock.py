"""Time, as a value that is handed around. The only module that reads a real clock.

Business deadlines are data compared with `clock.now()`; loops wait with `clock.sleep`. I/O timeouts are settings of
the library that does the I/O and need no clock. Tests pass `comfyfleet.testing.clock.FakeClock`, which never waits.
"""

from __future__ import annotations

import time
from typing import Protocol

import anyio


class Clock(Protocol):
    """Wall time for stamps and deadlines, a monotonic counter for durations, and a way to wait."""

    def now(self) -> float:
        """Seconds since the epoch (UTC)."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary point that never goes back: for durations only."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; a cancelled scope ends the wait."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.perf_counter()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

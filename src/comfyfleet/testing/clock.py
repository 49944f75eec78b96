"""A clock that never waits: `advance` wakes sleepers in order of their deadlines."""

from __future__ import annotations

import heapq
import itertools

import anyio
from anyio.lowlevel import checkpoint


class FakeClock:
    """Time stands still until `advance`. Sleepers due at the same time wake in the order they began to sleep."""

    def __init__(self, start_s: float = 1_700_000_000.0) -> None:
        self._now = start_s
        self._sleepers: list[tuple[float, int, anyio.Event]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await checkpoint()
            return
        wake = anyio.Event()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), wake))
        await wake.wait()

    def jump(self, seconds: float) -> None:
        """Move time without waking anybody: for code that only compares deadlines."""
        self._now += seconds

    async def advance(self, seconds: float) -> None:
        """Move time forward, letting every sleeper due on the way run until all tasks wait again."""
        until = self._now + seconds
        await anyio.wait_all_tasks_blocked()
        while self._sleepers and self._sleepers[0][0] <= until:
            due, _, wake = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)  # a sleeper that a `jump` passed over is late, time does not go back
            wake.set()
            await anyio.wait_all_tasks_blocked()
        self._now = until

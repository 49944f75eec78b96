"""Numbers that never repeat, not even over a restart: `request_idx` and `reqnum`. Reserved in blocks, so no write each.

A block is reserved in the store before its first number is handed out; what a crash leaves unused is skipped.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

BLOCK = 100_000


class Numbers:
    """`next` is synchronous and must find a number: call `refill` ahead of time (each second is plenty)."""

    def __init__(self, reserve: Callable[[int], Awaitable[int]]) -> None:
        self._reserve = reserve
        self._next = 0
        self._end = 0
        self._spare: list[tuple[int, int]] = []
        self.first = 0  # the first number of this run: smaller ones are from before a restart

    async def refill(self) -> None:
        """Have at least one whole block in reserve."""
        while len(self._spare) < 2:
            start = await self._reserve(BLOCK)
            self._spare.append((start, start + BLOCK))
            if not self._end:
                self._next, self._end = self._spare.pop(0)
                self.first = self._next

    def next(self) -> int:
        if self._next >= self._end:
            self._next, self._end = self._spare.pop(0)
        number = self._next
        self._next += 1
        return number

    def is_ahead(self, number: int) -> bool:
        """It was reserved here and handed to nobody yet."""
        return self._next <= number < self._end or any(start <= number < end for start, end in self._spare)

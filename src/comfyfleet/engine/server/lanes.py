"""The prompts that a render process has in hand: one that may sample, and one that only decodes and saves any more.

Pure state. A prompt enters the front lane; when it has sampled and the back lane is free it moves there, and the front
lane takes the next. So there are never more than two, and a slow film never piles up others behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfyfleet.engine.server.prompts import PromptRecord
from comfyfleet.engine.server.telling import Teller


@dataclass(kw_only=True, eq=False)
class Running:
    """A prompt in hand. `number` is the run's name between server and render process."""

    number: int
    record: PromptRecord
    teller: Teller
    has_sampled: bool = False


class Lanes:
    """Front and back."""

    def __init__(self) -> None:
        self._front: Running | None = None
        self._back: Running | None = None

    @property
    def is_open(self) -> bool:
        """Another prompt may start."""
        return self._front is None

    def all(self) -> list[Running]:
        """Oldest first."""
        return [running for running in (self._back, self._front) if running is not None]

    def get(self, number: int) -> Running | None:
        return next((running for running in self.all() if running.number == number), None)

    def enter(self, running: Running) -> None:
        assert self._front is None, "the front lane is taken"  # noqa: S101
        self._front = running

    def sampled(self, number: int) -> None:
        """It will not sample again; a prompt that ends before it could move has nothing of this."""
        if self._front is not None and self._front.number == number:
            self._front.has_sampled = True
            self._move_up()

    def leave(self, number: int) -> Running | None:
        """It ended; None when it was not in hand."""
        running = self.get(number)
        if running is not None and running is self._back:
            self._back = None
        elif running is not None:
            self._front = None
        self._move_up()
        return running

    def _move_up(self) -> None:
        if self._back is None and self._front is not None and self._front.has_sampled:
            self._back, self._front = self._front, None

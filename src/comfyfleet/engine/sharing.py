"""Two runs in one process, each on a thread of its own: what they must not do at the same time.

`InHand`: nobody computes what the other computes already. `Turns`: a run for which there was not memory enough beside
the other may go on alone, while the other stands still at its next step. Waits end when their run is stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.1  # how often a wait looks whether its run was stopped; what it waits for wakes it at once

CheckStop = Callable[[], None]


class InHand:
    """The signatures being computed now."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._signatures: set[str] = set()

    @contextmanager
    def hold(self, signature: str | None, check_stop: CheckStop) -> Iterator[None]:
        """Alone with this signature: what another run makes of it is there when this begins."""
        if signature is None:
            yield
            return
        with self._changed:
            while signature in self._signatures:
                self._changed.wait(LOOK_S)
                check_stop()
            self._signatures.add(signature)
        try:
            yield
        finally:
            with self._changed:
                self._signatures.discard(signature)
                self._changed.notify_all()


class Turns:
    """Which runs there are, and whether one of them needs the machine for itself for a while."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[object] = set()
        self._standing: set[object] = set()  # those that wait in here
        self._alone: list[object] = []  # who needs to be alone, the first one now

    @contextmanager
    def of(self, run: object) -> Iterator[None]:
        """The run's whole life."""
        with self._changed:
            self._running.add(run)
        try:
            yield
        finally:
            with self._changed:
                self._running.discard(run)
                self._changed.notify_all()

    def is_shared(self) -> bool:
        return len(self._running) > 1

    def give_way(self, run: object) -> None:
        """Stand still for as long as another run needs to be alone; asked at every step, so it must cost nothing."""
        first = self._alone[:1]  # one look: without the lock, the list may be empty by the next
        if not first or first[0] is run:
            return
        with self._changed:
            self._standing.add(run)
            self._changed.notify_all()
            while self._alone and self._alone[0] is not run:
                self._changed.wait()
            self._standing.discard(run)

    @contextmanager
    def alone(self, run: object, check_stop: CheckStop) -> Iterator[None]:
        """Until all others stand still or ended; whoever asked first goes first."""
        with self._changed:
            self._alone.append(run)
            self._standing.add(run)
            self._changed.notify_all()
        try:
            with self._changed:
                while self._alone[0] is not run or not (self._running - {run}) <= self._standing:
                    self._changed.wait(LOOK_S)
                    check_stop()
                self._standing.discard(run)
            yield
        finally:
            with self._changed:
                self._standing.discard(run)
                self._alone.remove(run)
                self._changed.notify_all()

"""How slow the machine is just now, beside its own best: a limit in seconds is about the software, not about the load.

A thread sleeps five milliseconds and works for two, again and again; how late it is with that, against the best it ever
did, is the factor by which everything here takes longer. On an idle machine it is about one.
"""

from __future__ import annotations

import threading
import time

_SLEEP_S = 0.005


class Yardstick:
    """`with Yardstick() as machine: …` and afterwards `seconds < 2.0 * machine.slowdown`."""

    def __init__(self) -> None:
        self._took: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)

    def __enter__(self) -> Yardstick:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def slowdown(self) -> float:
        return max(1.0, sum(self._took) / len(self._took) / min(self._took)) if self._took else 1.0

    def _measure(self) -> None:
        while not self._stop.is_set():
            due = time.perf_counter() + _SLEEP_S
            time.sleep(_SLEEP_S)
            sum(range(80_000))
            self._took.append(time.perf_counter() - due)

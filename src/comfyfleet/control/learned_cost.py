"""What a workflow of a known shape really costs, learned from jobs that finished; corrects a client's guess.

Cost is seconds times the worker's score, so a shape learned on one GPU holds on others. A shape is a digest of what
drives the time (nodes, steps, pixels, frames), made by whoever reads workflows. The estimate is the median of the last
jobs: one stalled job does not move it. Nothing is said before `ENOUGH` jobs.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque

ENOUGH = 3
KEPT_PER_SHAPE = 25
KEPT_SHAPES = 20_000


class LearnedCost:
    """Medians per (endpoint, shape). The least recently used shapes are forgotten first."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[int, str], deque[float]] = OrderedDict()
        self._medians: dict[tuple[int, str], float] = {}

    def learn(self, endpoint_id: int, shape: str, *, seconds: float, score: float) -> None:
        """A job of that shape ran `seconds` on a worker of that score."""
        if not shape or seconds <= 0 or score <= 0:
            return
        key = (endpoint_id, shape)
        costs = self._seen.setdefault(key, deque(maxlen=KEPT_PER_SHAPE))
        self._seen.move_to_end(key)
        costs.append(seconds * score)
        if len(costs) >= ENOUGH:
            self._medians[key] = statistics.median(costs)
        while len(self._seen) > KEPT_SHAPES:
            forgotten, _ = self._seen.popitem(last=False)
            self._medians.pop(forgotten, None)

    def cost(self, endpoint_id: int, shape: str) -> float | None:
        """Load units of a job of that shape; None while too few have been seen."""
        return self._medians.get((endpoint_id, shape))

    def seconds(self, endpoint_id: int, shape: str, score: float) -> float | None:
        """How long it takes on a worker of that score."""
        cost = self.cost(endpoint_id, shape)
        return None if cost is None or score <= 0 else cost / score

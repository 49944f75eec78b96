"""What a workflow of a known shape really costs, learned from jobs that finished; corrects a client's guess.

Cost is seconds times the worker's score, so a shape learned on one GPU holds on others. A shape is a digest of what
drives the time (nodes, steps, pixels, frames), made by whoever reads workflows. The estimate is the median of the last
jobs: one stalled job does not move it. Nothing is said before `ENOUGH` jobs.

A job whose models had to be loaded first is not counted among them; what it took longer is what loading costs there
(`swap_s`), which routing weighs against a queue elsewhere. The store carries all of it over a restart.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable

from comfyfleet.control.records import LearnedRow

ENOUGH = 3
KEPT_PER_SHAPE = 25
KEPT_SHAPES = 20_000
# Seconds lost to loading are learned per endpoint, under this name.
_SWAPS = "swap"


class LearnedCost:
    """Medians per (endpoint, shape). The least recently used shapes are forgotten first."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[int, str], deque[float]] = OrderedDict()
        self._medians: dict[tuple[int, str], float] = {}
        self._unsaved: set[tuple[int, str]] = set()

    def learn(self, endpoint_id: int, shape: str, *, seconds: float, score: float, loaded: bool = False) -> None:
        """A job of that shape ran `seconds` on a worker of that score. loaded: it had to load its models."""
        if not shape or seconds <= 0 or score <= 0:
            return
        if not loaded:
            self._add((endpoint_id, shape), seconds * score, enough=ENOUGH)
            return
        usual_s = self.seconds(endpoint_id, shape, score)
        if usual_s is not None:
            self._add((endpoint_id, _SWAPS), max(0.0, seconds - usual_s), enough=1)

    def cost(self, endpoint_id: int, shape: str) -> float | None:
        """Load units of a job of that shape; None while too few have been seen."""
        return self._medians.get((endpoint_id, shape))

    def seconds(self, endpoint_id: int, shape: str, score: float) -> float | None:
        """How long it takes on a worker of that score."""
        cost = self.cost(endpoint_id, shape)
        return None if cost is None or score <= 0 else cost / score

    def swap_s(self, endpoint_id: int) -> float | None:
        """What loading the models of a job costs at that endpoint; None while nobody has seen it."""
        return self._medians.get((endpoint_id, _SWAPS))

    def take_changes(self) -> tuple[list[LearnedRow], list[str]]:
        """(rows to save, ids of rows to drop) since the last call."""
        keys, self._unsaved = self._unsaved, set()
        changed = [
            LearnedRow(id=_id(key), endpoint_id=key[0], shape=key[1], costs=tuple(self._seen[key]))
            for key in keys
            if key in self._seen
        ]
        return changed, [_id(key) for key in keys if key not in self._seen]

    def unsaved(self, row_ids: Iterable[str]) -> None:
        """What `take_changes` gave could not be stored: give it again."""
        self._unsaved |= {
            (int(endpoint_id), shape) for endpoint_id, _, shape in (one.partition(":") for one in row_ids)
        }

    def load(self, rows: Iterable[LearnedRow]) -> None:
        """At start: what an earlier control plane learned."""
        for row in rows:
            key = (row.endpoint_id, row.shape)
            self._seen[key] = deque(row.costs, maxlen=KEPT_PER_SHAPE)
            self._judge(key, enough=1 if row.shape == _SWAPS else ENOUGH)

    def _add(self, key: tuple[int, str], value: float, *, enough: int) -> None:
        values = self._seen.setdefault(key, deque(maxlen=KEPT_PER_SHAPE))
        self._seen.move_to_end(key)
        values.append(value)
        self._unsaved.add(key)
        self._judge(key, enough=enough)
        while len(self._seen) > KEPT_SHAPES:
            oldest, _ = self._seen.popitem(last=False)
            self._medians.pop(oldest, None)
            self._unsaved.add(oldest)

    def _judge(self, key: tuple[int, str], *, enough: int) -> None:
        values = self._seen[key]
        if len(values) >= enough:
            self._medians[key] = statistics.median(values)


def _id(key: tuple[int, str]) -> str:
    return f"{key[0]}:{key[1]}"

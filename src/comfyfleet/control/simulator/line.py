"""Who waits at the simulated endpoint: a first-in-first-out lane per tenant, and turns between them by fair share.

What `turns` and `route_queue` do for keys, with the same `FairShare`, every weight 1 and no limits. One tenant alone is
one plain line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from comfyfleet.control.fair_share import FairShare
from comfyfleet.control.router import LOOKAHEAD
from comfyfleet.control.simulator.machines import Job


class WaitingLine:
    """count, work: requests that wait and their load units. No lane is empty."""

    __slots__ = ("_lanes", "count", "share", "work")

    def __init__(self) -> None:
        self._lanes: dict[str, deque[Job]] = {}
        self.count = 0
        self.work = 0.0
        self.share = FairShare()  # also of those that never had to wait

    def add(self, job: Job) -> None:
        """At the end of its tenant's lane."""
        lane = self._lanes.get(job[4])
        if lane is None:
            lane = self._lanes[job[4]] = deque()
        lane.append(job)
        self.count += 1
        self.work += job[2]

    def front(self) -> Job:
        """The first of the tenant whose turn it is; it stays. Somebody must wait."""
        lanes = self._lanes
        tenant = next(iter(lanes)) if len(lanes) == 1 else self.share.next(lanes.keys())
        return lanes[tenant or ""][0]

    def behind(self, front: Job) -> Iterator[Job]:
        """Those that may overtake it: next in its own lane, then the first of the other lanes."""
        yield from islice(self._lanes[front[4]], 1, LOOKAHEAD)
        for tenant, lane in islice(self._lanes.items(), LOOKAHEAD):
            if tenant != front[4]:
                yield lane[0]

    def take(self, job: Job) -> None:
        """It waits no more."""
        lane = self._lanes[job[4]]
        lane.remove(job)  # compares numbers first, and no two are the same
        if not lane:
            del self._lanes[job[4]]
        self.count -= 1
        self.work -= job[2]

    def oldest_at(self, now: float) -> float:
        """When the longest waiting arrived; now if nobody waits."""
        return min((lane[0][1] for lane in self._lanes.values()), default=now)

"""How much work arrives at an endpoint, measured: load units in one-second buckets, and rates made of them.

Counts each logical request once, when it first arrives. The autoscaler gets the rates as values (`DemandRates`); the
simulator fills the same meter in virtual time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from comfyfleet.control.records import DemandRow

SHORT_S = 15.0
MIDDLE_S = 60.0
LONG_S = 300.0
# Of a request before any came, and the weight of the newest one in the mean.
USUAL_COST = 100.0
_NEWEST = 0.05


class DemandRates(msgspec.Struct, frozen=True, kw_only=True):
    """Load units per second over the last 15, 60 and 300 s; trend: change of the rate, in load/s per second.

    mean_cost: load units of a request, of late.
    """

    short: float = 0.0
    middle: float = 0.0
    long: float = 0.0
    trend: float = 0.0
    last_arrival_at: float = 0.0
    mean_cost: float = USUAL_COST


class DemandMeter:
    """A sliding sum of arrivals. A young meter reads low on purpose: what waits is counted apart, as it is."""

    def __init__(self, row: DemandRow | None = None) -> None:
        """row: what was measured before."""
        self._buckets: deque[list[float]] = deque(list(pair) for pair in row.buckets) if row else deque()
        self._last_arrival_at = row.last_arrival_at if row else 0.0
        self._mean_cost = row.mean_cost if row else 0.0  # 0: none came yet

    def row(self, endpoint_id: int) -> DemandRow:
        """For the store; [second, load units] of each bucket."""
        buckets = tuple((second, cost) for second, cost in self._buckets)
        return DemandRow(
            id=endpoint_id, last_arrival_at=self._last_arrival_at, buckets=buckets, mean_cost=self._mean_cost
        )

    def arrived(self, cost: float, now: float) -> None:
        second = float(int(now))
        while self._buckets and self._buckets[0][0] < now - LONG_S:
            self._buckets.popleft()
        if self._buckets and self._buckets[-1][0] == second:
            self._buckets[-1][1] += cost
        else:
            self._buckets.append([second, cost])
        self._last_arrival_at = now
        self._mean_cost = self._mean_cost + (cost - self._mean_cost) * _NEWEST if self._mean_cost else cost

    def rates(self, now: float) -> DemandRates:
        while self._buckets and self._buckets[0][0] < now - LONG_S:
            self._buckets.popleft()
        short = middle = long = before_short = 0.0
        for second, cost in self._buckets:
            age_s = now - second
            long += cost
            if age_s <= MIDDLE_S:
                middle += cost
            if age_s <= SHORT_S:
                short += cost
            elif age_s <= 2 * SHORT_S:
                before_short += cost
        return DemandRates(
            short=short / SHORT_S,
            middle=middle / MIDDLE_S,
            long=long / LONG_S,
            trend=(short - before_short) / SHORT_S / SHORT_S,
            last_arrival_at=self._last_arrival_at,
            mean_cost=self._mean_cost or USUAL_COST,
        )


class Meters:
    """One meter per endpoint. They outlive a restart: a fleet is not let go because its demand was forgotten."""

    def __init__(self) -> None:
        self._meters: dict[int, DemandMeter] = {}
        self._unsaved: set[int] = set()

    def arrived(self, endpoint_id: int, cost: float, now: float) -> None:
        meter = self._meters.get(endpoint_id)
        if meter is None:
            meter = self._meters[endpoint_id] = DemandMeter()
        meter.arrived(cost, now)
        self._unsaved.add(endpoint_id)

    def take_changes(self) -> list[DemandRow]:
        """What to save since the last call."""
        changed, self._unsaved = self._unsaved, set()
        return [self._meters[endpoint_id].row(endpoint_id) for endpoint_id in changed if endpoint_id in self._meters]

    def unsaved(self, rows: Iterable[DemandRow]) -> None:
        """What `take_changes` gave could not be stored: give it again."""
        self._unsaved |= {row.id for row in rows}

    def load(self, rows: Iterable[DemandRow]) -> None:
        """What an earlier control plane measured."""
        for row in rows:
            self._meters[row.id] = DemandMeter(row)

    def rates(self, endpoint_id: int, now: float) -> DemandRates:
        meter = self._meters.get(endpoint_id)
        return meter.rates(now) if meter is not None else DemandRates()

    def forget(self, endpoint_id: int) -> None:
        self._meters.pop(endpoint_id, None)


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """Durable jobs that wait in the store."""

    jobs: int = 0
    cost: float = 0.0
    oldest_at: float = 0.0


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What waits (requests, load units, seconds) and what arrives."""

    waiting: int = 0
    waiting_cost: float = 0.0
    oldest_wait_s: float = 0.0
    rates: DemandRates = DemandRates()

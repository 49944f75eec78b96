"""How much work arrives at an endpoint, measured: load units in one-second buckets, and rates made of them.

Counts each logical request once, when it first arrives. The autoscaler gets the rates as values (`DemandRates`); the
simulator fills the same meter in virtual time.
"""

from __future__ import annotations

from collections import deque

import msgspec

SHORT_S = 15.0
MIDDLE_S = 60.0
LONG_S = 300.0


class DemandRates(msgspec.Struct, frozen=True, kw_only=True):
    """Load units per second over the last 15, 60 and 300 s; trend: change of the rate, in load/s per second."""

    short: float = 0.0
    middle: float = 0.0
    long: float = 0.0
    trend: float = 0.0
    last_arrival_at: float = 0.0


class DemandMeter:
    """A sliding sum of arrivals. A young meter reads low on purpose: what waits is counted apart, as it is."""

    def __init__(self) -> None:
        self._buckets: deque[list[float]] = deque()  # [second, load units]
        self._last_arrival_at = 0.0

    def arrived(self, cost: float, now: float) -> None:
        second = float(int(now))
        if self._buckets and self._buckets[-1][0] == second:
            self._buckets[-1][1] += cost
        else:
            self._buckets.append([second, cost])
        self._last_arrival_at = now

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
        )


class Meters:
    """One meter per endpoint."""

    def __init__(self) -> None:
        self._meters: dict[int, DemandMeter] = {}

    def arrived(self, endpoint_id: int, cost: float, now: float) -> None:
        meter = self._meters.get(endpoint_id)
        if meter is None:
            meter = self._meters[endpoint_id] = DemandMeter()
        meter.arrived(cost, now)

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

"""The requests that asked for a worker: one record each, and per endpoint and key a first-in-first-out line.

A record outlives its answer, because the public client comes back with the same `request_idx` after a failure. A line
is ordered by arrival, and a request that comes back takes its old place in it. Durable jobs stand in a line of their
own, since a key's rate limit held them up before they were accepted. No decisions here (`desk`, `turns`).

Tickets are kept by the hundred thousand, and none is ever part of a cycle, so Python's cycle collector need not know
of them (`gc=False`): to look at 67,000 each time took it 50 ms, in which nobody was answered.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

import anyio
import msgspec

from comfyfleet.control.router import Want

# How long a request that has its worker is remembered after its last sign of life, and one that is finished.
KEPT_S = 900.0
FINISHED_KEPT_S = 180.0
_NOBODY: frozenset[int] = frozenset()


class Phase(StrEnum):
    """waiting -> granted (a worker is booked, the caller has not heard) -> assigned -> finished; back at any return."""

    WAITING = "waiting"
    GRANTED = "granted"
    ASSIGNED = "assigned"
    FINISHED = "finished"


class RouteTicket(msgspec.Struct, kw_only=True, eq=False, gc=False):
    """One logical request. order: its place in the line. excluded: workers that just failed it, until when.

    avoided: workers that refused it as full; tried again only where no other has room.
    """

    request_idx: int
    endpoint_id: int
    scope: str
    want: Want
    shape: str
    order: int
    arrived_at: float
    polled_at: float
    replay_timeout: float
    held: bool = False
    phase: Phase = Phase.WAITING
    worker_id: int = 0
    phase_at: float = 0.0
    returns: int = 0
    not_before: float = 0.0
    rejoined_at: float = 0.0
    preferred: int = 0
    uncollected: bool = False
    is_accounted: bool = False  # what it took on its present worker is known
    bypassed: int = 0
    excluded: dict[int, float] | None = None
    avoided: frozenset[int] = _NOBODY
    changed: anyio.Event | None = None

    @property
    def lane(self) -> Lane:
        return Lane(self.scope, self.held)

    def to(self, phase: Phase, now: float) -> None:
        """Next phase; wakes who waits for one."""
        self.phase = phase
        self.phase_at = now
        if self.changed is not None:
            self.changed.set()
            self.changed = None

    def exclude(self, worker_id: int, until: float) -> None:
        """Not that worker, until then. Most requests never need this, and hundreds of thousands are kept."""
        if self.excluded is None:
            self.excluded = {}
        self.excluded[worker_id] = until

    def excluded_now(self, now: float) -> frozenset[int]:
        """Workers not to try now; forgets the others."""
        if not self.excluded:
            return _NOBODY
        self.excluded = {worker: until for worker, until in self.excluded.items() if until > now}
        return frozenset(self.excluded)


class Lane(NamedTuple):
    """One line: a key's requests, or (held) a key's durable jobs."""

    scope: str
    held: bool


@dataclass(slots=True, kw_only=True)
class Line:
    """Waiting tickets of one lane, as a heap of (order, request_idx); entries of others are dropped when met."""

    heap: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0
    cost: float = 0.0


class RouteQueue:
    """All tickets, and the waiting ones in order per endpoint and lane."""

    def __init__(self) -> None:
        self._tickets: dict[int, RouteTicket] = {}
        self._lines: dict[int, dict[Lane, Line]] = {}
        self._waiting: dict[int, int] = {}
        self._deadlines: list[tuple[float, int]] = []
        self.granted: set[int] = set()  # booked, and not told yet

    def get(self, request_idx: int) -> RouteTicket | None:
        return self._tickets.get(request_idx)

    def add(self, ticket: RouteTicket) -> None:
        """A new ticket; it waits."""
        self._tickets[ticket.request_idx] = ticket
        heapq.heappush(self._deadlines, (ticket.polled_at + ticket.replay_timeout, ticket.request_idx))
        self._enter(ticket)

    def adopt(self, ticket: RouteTicket) -> None:
        """A ticket that a worker already has: it never stood in a line."""
        self._tickets[ticket.request_idx] = ticket
        heapq.heappush(self._deadlines, (ticket.polled_at + KEPT_S, ticket.request_idx))

    def wait_again(self, ticket: RouteTicket, now: float) -> None:
        """Back into the line, at its old place."""
        ticket.to(Phase.WAITING, now)
        ticket.worker_id = 0
        ticket.is_accounted = False
        self.granted.discard(ticket.request_idx)
        heapq.heappush(self._deadlines, (ticket.polled_at + ticket.replay_timeout, ticket.request_idx))
        self._enter(ticket)

    def leave(self, ticket: RouteTicket, phase: Phase, worker_id: int, now: float) -> None:
        """Out of the line (its heap entry is dropped when it is met)."""
        if ticket.phase is Phase.WAITING:
            self._uncount(ticket)
        if phase is Phase.GRANTED:
            self.granted.add(ticket.request_idx)
        else:
            self.granted.discard(ticket.request_idx)
        ticket.worker_id = worker_id
        ticket.to(phase, now)

    def waiting_count(self, endpoint_id: int) -> int:
        return self._waiting.get(endpoint_id, 0)

    def lanes(self, endpoint_id: int) -> list[Lane]:
        """Those with somebody waiting."""
        return [lane for lane, line in self._lines.get(endpoint_id, {}).items() if line.count]

    def waiting_in(self, endpoint_id: int, lane: Lane) -> tuple[int, float]:
        """(requests, load units) of one lane."""
        line = self._lines.get(endpoint_id, {}).get(lane)
        return (line.count, line.cost) if line is not None and line.count else (0, 0.0)

    def line(self, endpoint_id: int, lane: Lane) -> Iterator[RouteTicket]:
        """Take waiting tickets from the front, one by one; the caller puts back those that go on waiting."""
        line = self._lines.get(endpoint_id, {}).get(lane)
        while line is not None and line.heap:
            order, request_idx = heapq.heappop(line.heap)
            ticket = self._tickets.get(request_idx)
            if ticket is not None and ticket.phase is Phase.WAITING and ticket.order == order:
                yield ticket

    def peek(self, endpoint_id: int, lane: Lane, count: int) -> list[RouteTicket]:
        """The next waiting tickets of a lane, in order, left where they are."""
        found = list(islice(self.line(endpoint_id, lane), count))
        for ticket in found:
            self.put_back(ticket)
        return found

    def put_back(self, ticket: RouteTicket) -> None:
        """A ticket taken by `line` that still waits."""
        line = self._lines[ticket.endpoint_id][ticket.lane]
        heapq.heappush(line.heap, (ticket.order, ticket.request_idx))

    def oldest_arrival(self, endpoint_id: int) -> float | None:
        """When the longest waiting of those at the front of their lines arrived; None if nobody waits."""
        fronts = (ticket for lane in self.lanes(endpoint_id) for ticket in self.peek(endpoint_id, lane, 1))
        return min((ticket.arrived_at for ticket in fronts), default=None)

    def forget(self, endpoint_id: int) -> None:
        """Drop an endpoint's tickets; whoever waits on one wakes up and finds it unknown."""
        for ticket in [ticket for ticket in self._tickets.values() if ticket.endpoint_id == endpoint_id]:
            del self._tickets[ticket.request_idx]
            self.granted.discard(ticket.request_idx)
            if ticket.changed is not None:
                ticket.changed.set()
        self._lines.pop(endpoint_id, None)
        self._waiting.pop(endpoint_id, None)

    def expire(self, now: float, is_running: Callable[[RouteTicket], bool]) -> list[RouteTicket]:
        """Forget tickets nobody asks for any more; returns the waiting and granted ones that were dropped."""
        dropped = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_idx = heapq.heappop(self._deadlines)
            ticket = self._tickets.get(request_idx)
            if ticket is None:
                continue
            is_open = ticket.phase in (Phase.WAITING, Phase.GRANTED)
            kept_s = FINISHED_KEPT_S if ticket.phase is Phase.FINISHED else KEPT_S
            kept_s = ticket.replay_timeout if is_open else kept_s
            due = max(ticket.polled_at, ticket.phase_at if not is_open else 0.0) + kept_s
            if due > now or (not is_open and is_running(ticket)):
                heapq.heappush(self._deadlines, (max(due, now + 1.0), request_idx))
                continue
            del self._tickets[request_idx]
            self.granted.discard(request_idx)
            if is_open:
                if ticket.phase is Phase.WAITING:
                    self._uncount(ticket)
                dropped.append(ticket)
        return dropped

    def _enter(self, ticket: RouteTicket) -> None:
        self._waiting[ticket.endpoint_id] = self._waiting.get(ticket.endpoint_id, 0) + 1
        lines = self._lines.setdefault(ticket.endpoint_id, {})
        line = lines.get(ticket.lane)
        if line is None:
            line = lines[ticket.lane] = Line()
        line.count += 1
        line.cost += ticket.want.cost
        heapq.heappush(line.heap, (ticket.order, ticket.request_idx))

    def _uncount(self, ticket: RouteTicket) -> None:
        """It waits no more."""
        self._waiting[ticket.endpoint_id] -= 1
        line = self._lines[ticket.endpoint_id][ticket.lane]
        line.count -= 1
        line.cost -= ticket.want.cost
        if not line.count:
            del self._lines[ticket.endpoint_id][ticket.lane]

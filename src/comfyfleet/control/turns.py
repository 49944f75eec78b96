"""Who of those that wait is next, and on which worker: serves an endpoint's lines as long as there is room.

Between keys the fair share decides, in GPU-seconds as predicted for the worker that was chosen; inside a key it is
first in, first out. A key over its rate limit or out of its day's GPU-seconds is passed over until its time has come;
the others go on. Durable jobs stand in the same account (`share`), but their limits were taken when they were accepted.
"""

from __future__ import annotations

from collections.abc import Callable

from comfyfleet.control.demand import Meters
from comfyfleet.control.fair_share import FairShare
from comfyfleet.control.limits import Allowance, Hold
from comfyfleet.control.load import Booking
from comfyfleet.control.route_queue import Lane, Phase, RouteQueue, RouteTicket
from comfyfleet.control.router import LOOKAHEAD, Refusal, choose, is_overtaker, may_overtake
from comfyfleet.control.workers import Workers

# A key that is held back counts as demand for what it may send in this time: no fleet is grown for the rest.
HELD_DEMAND_S = 10.0


class Turns:
    """One for the whole control plane, over the queue and the registry."""

    def __init__(
        self,
        *,
        queue: RouteQueue,
        workers: Workers,
        allowance: Allowance,
        meters: Meters,
        owns: Callable[[int], bool] = lambda _endpoint_id: True,
    ) -> None:
        """owns: whether this control plane may book workers for an endpoint now."""
        self._owns = owns
        self._queue = queue
        self._workers = workers
        self._allowance = allowance
        self._meters = meters
        self._shares: dict[int, FairShare] = {}
        self._max_queue_time: dict[int, float] = {}

    def asked(self, endpoint_id: int, max_queue_time: float) -> None:
        """Somebody wants a worker there, under that limit."""
        self._max_queue_time[endpoint_id] = max_queue_time

    def forget(self, endpoint_id: int) -> None:
        """Another control plane serves it."""
        self._max_queue_time.pop(endpoint_id, None)
        self._shares.pop(endpoint_id, None)

    def endpoints(self) -> list[int]:
        return list(self._max_queue_time)

    def share(self, endpoint_id: int) -> FairShare:
        share = self._shares.get(endpoint_id)
        if share is None:
            share = self._shares[endpoint_id] = FairShare()
        return share

    def arrived(self, ticket: RouteTicket, now: float) -> None:
        """A new request: demand, unless its key is limited; then it is demand when it goes."""
        if not ticket.held and not self._allowance.is_limited(ticket.scope):
            self._meters.arrived(ticket.endpoint_id, ticket.want.cost, now)

    def outside(self, ticket: RouteTicket) -> Hold:
        """Why a request is not even in the line."""
        most = self._allowance.most_waiting(ticket.scope)
        return Hold(reason=f"this key has {most} requests waiting, and may have no more", wait_s=1.0)

    def has_room(self, endpoint_id: int, lane: Lane) -> bool:
        """One more request of that key may wait."""
        most = 0 if lane.held else self._allowance.most_waiting(lane.scope)
        return not most or self._queue.waiting_in(endpoint_id, lane)[0] < most

    def hold(self, ticket: RouteTicket, now: float) -> Hold | None:
        """Why this request is passed over by its key's limits, and for how long; None if it is not."""
        return self._lane_hold(ticket.lane, now)

    def waiting(self, endpoint_id: int, now: float) -> tuple[int, float]:
        """(requests, load units) that capacity would help: of a key that is held back only what it may send soon."""
        count, cost = 0, 0.0
        for lane in self._queue.lanes(endpoint_id):
            of_lane, cost_of_lane = self._queue.waiting_in(endpoint_id, lane)
            if self._lane_hold(lane, now) is not None:
                may_come = min(of_lane, self._allowance.soon(lane.scope, HELD_DEMAND_S, now))
                cost_of_lane *= may_come / of_lane
                of_lane = may_come
            count += of_lane
            cost += cost_of_lane
        return count, cost

    def at_once(self, ticket: RouteTicket, now: float) -> bool:
        """Book a worker for a new request that nobody waits before; False: it has to stand in the line."""
        if self._queue.waiting_count(ticket.endpoint_id) or self.hold(ticket, now) is not None:
            return False
        chosen = self._choose(ticket, now)
        if isinstance(chosen, Refusal):
            return False
        self._book(ticket, chosen, self.share(ticket.endpoint_id), now)
        ticket.worker_id = chosen
        ticket.to(Phase.ASSIGNED, now)
        self._queue.adopt(ticket)
        return True

    def serve(self, endpoint_id: int, now: float) -> None:
        """Book workers for those that wait, in turn, as long as there is room."""
        if not self._queue.waiting_count(endpoint_id) or not self._owns(endpoint_id):
            return
        share = self.share(endpoint_id)
        lanes = [lane for lane in self._queue.lanes(endpoint_id) if self._lane_hold(lane, now) is None]
        set_aside: list[RouteTicket] = []
        while lanes:
            lane = self._next(share, lanes)
            ticket = next(self._queue.line(endpoint_id, lane), None)
            if ticket is None:
                lanes.remove(lane)
                continue
            chosen = Refusal.ALL_EXCLUDED if ticket.uncollected else self._choose(ticket, now)
            if isinstance(chosen, Refusal):
                set_aside.append(ticket)
                # Where one that is left out for this request may have room, others need not wait behind it.
                if chosen is not Refusal.ALL_EXCLUDED and not ticket.excluded_now(now):
                    break
                continue
            self._grant(self._overtaken(ticket, lane, lanes, chosen, now), chosen, share, now)
            if self._lane_hold(lane, now) is not None:
                lanes.remove(lane)
        for ticket in set_aside:
            self._queue.put_back(ticket)

    def _next(self, share: FairShare, lanes: list[Lane]) -> Lane:
        if len(lanes) == 1:
            return lanes[0]
        scope = share.next({lane.scope for lane in lanes})
        return next(lane for lane in lanes if lane.scope == scope)

    def _lane_hold(self, lane: Lane, now: float) -> Hold | None:
        """A durable job was held up by its key's limits before it was accepted, and is not again."""
        return None if lane.held else self._allowance.hold(lane.scope, now)

    def _overtaken(self, ticket: RouteTicket, lane: Lane, lanes: list[Lane], worker_id: int, now: float) -> RouteTicket:
        """The ticket, or one behind it that this worker is warm for: it goes first, and the ticket stays in front."""
        if not may_overtake(ticket.bypassed, ticket.want, self._workers.load(worker_id)):
            return ticket
        endpoint_id = ticket.endpoint_id
        behind = self._queue.peek(endpoint_id, lane, LOOKAHEAD)
        for other_lane in lanes[:LOOKAHEAD]:
            if other_lane != lane:
                behind += self._queue.peek(endpoint_id, other_lane, 1)
        overtaker = next((other for other in behind if self._fits(other, worker_id, now)), None)
        if overtaker is None:
            return ticket
        ticket.bypassed += 1
        self._queue.put_back(ticket)
        return overtaker

    def _fits(self, ticket: RouteTicket, worker_id: int, now: float) -> bool:
        load = self._workers.load(worker_id)
        return not ticket.uncollected and worker_id not in ticket.excluded_now(now) and is_overtaker(ticket.want, load)

    def _grant(self, ticket: RouteTicket, worker_id: int, share: FairShare, now: float) -> None:
        self._book(ticket, worker_id, share, now)
        self._queue.leave(ticket, Phase.GRANTED, worker_id, now)

    def _book(self, ticket: RouteTicket, worker_id: int, share: FairShare, now: float) -> None:
        booking = Booking(
            request_idx=ticket.request_idx,
            cost=ticket.want.cost,
            at=now,
            held=ticket.held,
            models=ticket.want.models,
        )
        load = self._workers.load(worker_id)
        self._workers.book(worker_id, booking)
        share.served(ticket.scope, booking.work / load.score, self._allowance.weight(ticket.scope))
        if not ticket.held and self._allowance.is_limited(ticket.scope):
            self._allowance.took(ticket.scope, now)
            # Demand is what the key may send, not what it would like to.
            self._meters.arrived(ticket.endpoint_id, ticket.want.cost, now)

    def _choose(self, ticket: RouteTicket, now: float) -> int | Refusal:
        excluded = ticket.excluded_now(now)
        chosen = self._choose_without(ticket, excluded | ticket.avoided if ticket.avoided else excluded, now)
        if isinstance(chosen, Refusal) and ticket.avoided - excluded:
            return self._choose_without(ticket, excluded, now)
        return chosen

    def _choose_without(self, ticket: RouteTicket, excluded: frozenset[int], now: float) -> int | Refusal:
        return choose(
            self._workers.candidates(ticket.endpoint_id),
            ticket.want,
            max_queue_time=self._max_queue_time.get(ticket.endpoint_id, 30.0),
            excluded=excluded,
            now=now,
        )

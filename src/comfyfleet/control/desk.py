"""The desk in front of the line: takes a request, and answers with a worker or with a place in the queue.

Both doors lead here: `/route/` and the dispatcher of durable jobs. Synchronous and in memory; a caller that may wait
holds on to `RouteTicket.changed`. What the desk is not: it gives no turns (`turns`), chooses no worker (`router`) and
scales nothing.

A returning request is one whose caller came back after it had its worker. It goes back to that worker as long as the
worker still lists it (the repeat joins the running job). If it comes back from there at once, or the worker never heard
of it, the worker is left out for this request for a while, and for everybody until it reports again; after the strike
of a second request, with nobody's work begun there in between, it is in quarantine. Returns are answered more and more
slowly, so a caller in a tight loop costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from comfyfleet.clock import Clock
from comfyfleet.control.demand import Backlog, Demand, Meters
from comfyfleet.control.leases import avoided
from comfyfleet.control.limits import Allowance, Hold
from comfyfleet.control.load import Booking
from comfyfleet.control.numbers import Numbers
from comfyfleet.control.placements import Placed, TakeRequest, Waits, finished_entries, state_counts
from comfyfleet.control.route_queue import Phase, RouteQueue, RouteTicket
from comfyfleet.control.router import Want
from comfyfleet.control.tickets import TICKET_LIFETIME_S, Tickets
from comfyfleet.control.turns import Turns
from comfyfleet.control.worker import Worker
from comfyfleet.control.workers import Folded, Workers
from comfyfleet.ids import Ids
from comfyfleet.wire.routing import RouteReady, RouteWaiting
from comfyfleet.wire.tickets import TicketClaims
from comfyfleet.wire.workers import FinishedRequests

# How long a booked worker waits for the caller's next poll (the public client polls at least each 5 s).
GRANT_S = 7.0
# A worker that failed a request is not tried again with it for so long.
EXCLUDED_S = 10.0
FULL_S = 2.0
REJOIN_S = 10.0
# A second request that cannot reach a worker within this time puts it in quarantine.
STRIKE_WINDOW_S = 15.0
_THROTTLE_FIRST_S = 0.06
_THROTTLE_CAP_S = 2.0
ELSEWHERE = "another control plane decides for this endpoint, or is about to; the next poll finds it"


class Desk:
    """One for the whole control plane."""

    def __init__(
        self,
        *,
        workers: Workers,
        tickets: Tickets,
        numbers: Numbers,
        reqnums: Numbers,
        allowance: Allowance,
        clock: Clock,
        ids: Ids,
        owns: Callable[[int], bool],
    ) -> None:
        self.queue = RouteQueue()
        self.meters = Meters()
        self.turns = Turns(queue=self.queue, workers=workers, allowance=allowance, meters=self.meters, owns=owns)
        self.reasons: dict[int, str] = {}  # endpoint -> why it waits, as the reconciler last saw it
        self._workers = workers
        self._tickets = tickets
        self._numbers = numbers
        self._reqnums = reqnums
        self._clock = clock
        self._ids = ids
        self._owns = owns
        self._strikes: dict[int, tuple[int, float]] = {}  # worker -> the request that could not reach it, and when
        self._adopted: dict[int, int] = {}  # request -> worker that listed it before its caller came back
        self._backlogs: dict[int, Backlog] = {}
        self.on_first_wait: Callable[[], None] = lambda: None

    # --- the doors -----------------------------------------------------------------------------------------------
    def take(self, request: TakeRequest) -> Placed | Waits:
        """A worker for the request, or its place in the line."""
        now = self._clock.now()
        self.turns.asked(request.endpoint_id, request.max_queue_time)
        ticket = self._known(request, now)
        if ticket is None:
            ticket = self._fresh(request, now)
            if request.request_idx <= 0:
                self.turns.arrived(ticket, now)
            if not request.excluded and self.turns.at_once(ticket, now):
                return self._placed(request, ticket, now)
            if not self.turns.has_room(request.endpoint_id, ticket.lane):
                return self._waits(request, ticket, self.turns.outside(ticket))
            self.queue.add(ticket)
        else:
            ticket.polled_at = now
            ticket.replay_timeout = request.replay_timeout
            ticket.uncollected = False
            if ticket.phase in (Phase.ASSIGNED, Phase.FINISHED):
                self._returned(ticket, now)
        if request.held:
            ticket.excluded = None  # its holder says each time whom to leave out, and nobody else does
        for worker_id in request.excluded:
            ticket.exclude(worker_id, now + EXCLUDED_S)
        if ticket.phase is Phase.WAITING:
            self.turns.serve(ticket.endpoint_id, now)
        if ticket.phase is Phase.GRANTED and now >= ticket.not_before and self._owns(ticket.endpoint_id):
            worker = self._workers.get(ticket.worker_id)
            if worker is not None:
                self.queue.leave(ticket, Phase.ASSIGNED, worker.id, now)
                return self._placed(request, ticket, now)
            self.queue.wait_again(ticket, now)
        if self.queue.waiting_count(ticket.endpoint_id) == 1:
            self.on_first_wait()
        return self._waits(request, ticket, self.turns.hold(ticket, now))

    def to_avoid(self, endpoint_id: int, lost_on: frozenset[int]) -> frozenset[int]:
        """Of the workers that lost a durable job, those it is not to have again now: `TakeRequest.excluded`."""
        return avoided(lost_on, self._workers.of_endpoint(endpoint_id)) if lost_on else lost_on

    def release(self, request_idx: int) -> None:
        """The holder of a durable job is done with its booking; the ticket is forgotten in time."""
        ticket = self.queue.get(request_idx)
        if ticket is None:
            return
        now = self._clock.now()
        if ticket.worker_id and self._workers.get(ticket.worker_id) is not None:
            self._workers.load(ticket.worker_id).finish(request_idx, now)
        self.queue.leave(ticket, Phase.FINISHED, ticket.worker_id, now)
        self.turns.serve(ticket.endpoint_id, now)

    def set_backlog(self, endpoint_id: int, *, jobs: int, cost: float, oldest_at: float) -> None:
        """Durable jobs that wait elsewhere: demand like any other."""
        self._backlogs[endpoint_id] = Backlog(jobs=jobs, cost=cost, oldest_at=oldest_at)

    def arrived(self, endpoint_id: int, cost: float) -> None:
        """Work that arrived by another door and will pass the desk later (a durable job)."""
        self.meters.arrived(endpoint_id, cost, self._clock.now())

    def forget(self, endpoint_id: int) -> None:
        """It is another control plane's: whoever waits here is answered, and finds it there with the next poll."""
        self.queue.forget(endpoint_id)
        self.turns.forget(endpoint_id)
        self.meters.forget(endpoint_id)
        self.reasons.pop(endpoint_id, None)
        self._backlogs.pop(endpoint_id, None)
        workers = self._workers.ids_of(endpoint_id)
        self._adopted = {idx: worker_id for idx, worker_id in self._adopted.items() if worker_id not in workers}

    # --- what workers say ----------------------------------------------------------------------------------------
    def heard(self, folded: Folded, working: tuple[int, ...]) -> None:
        """A worker reported: adopt what it has, serve the line if that made room."""
        now = self._clock.now()
        worker = folded.after
        for request_idx in folded.adopted:
            ticket = self.queue.get(request_idx)
            if ticket is None:
                self._adopted[request_idx] = worker.id
            elif ticket.phase is Phase.WAITING and ticket.endpoint_id == worker.endpoint_id:
                self.queue.leave(ticket, Phase.ASSIGNED, worker.id, now)
        if (strike := self._strikes.get(worker.id)) is not None and self._has_reached(worker.id, working, strike):
            del self._strikes[worker.id]
        self.turns.serve(worker.endpoint_id, now)

    def finished(self, worker: Worker, report: FinishedRequests) -> int:
        """Fold `/delete_requests/` in; unknown tickets are ignored. Returns how many were known."""
        now = self._clock.now()
        load = self._workers.load(worker.id)
        known = 0
        for entry in finished_entries(report):
            booking = load.finish(entry.request_idx, now)
            self._adopted.pop(entry.request_idx, None)
            ticket = self.queue.get(entry.request_idx)
            if ticket is not None and ticket.phase is Phase.ASSIGNED and ticket.worker_id == worker.id:
                self.queue.leave(ticket, Phase.FINISHED, worker.id, now)
                if entry.status == "Rejected":
                    ticket.exclude(worker.id, now + FULL_S)
                    ticket.avoided |= {worker.id}
                elif not entry.success:
                    ticket.exclude(worker.id, now + EXCLUDED_S)
                elif entry.status != "Cancelled" and worker.incarnation:
                    ticket.preferred = worker.id
                elif entry.status != "Cancelled":
                    # Another make of worker replays nothing, and says Success whatever its model answered, be it a 503.
                    ticket.avoided |= {worker.id}
            known += booking is not None
            if entry.success and entry.status != "Cancelled":
                self._strikes.pop(worker.id, None)
                self._workers.vouch(worker.id, now)
        self.turns.serve(worker.endpoint_id, now)
        return known

    def lost(self, worker_id: int, request_idxs: list[int]) -> None:
        """A worker is gone with these requests: their callers will come back and wait in their old places."""
        now = self._clock.now()
        for request_idx in request_idxs:
            self._adopted.pop(request_idx, None)
            ticket = self.queue.get(request_idx)
            if ticket is not None and ticket.worker_id == worker_id and ticket.phase is not Phase.FINISHED:
                if ticket.phase is Phase.GRANTED:
                    self.queue.wait_again(ticket, now)
                else:
                    self.queue.leave(ticket, Phase.FINISHED, worker_id, now)
                    ticket.exclude(worker_id, now + EXCLUDED_S)

    def regrant(self, worker_id: int) -> None:
        """A worker begins to drain: requests booked there whose callers have not heard yet go elsewhere."""
        now = self._clock.now()
        for request_idx in list(self.queue.granted):
            ticket = self.queue.get(request_idx)
            if ticket is not None and ticket.worker_id == worker_id:
                self._workers.load(worker_id).finish(request_idx, now)
                self.queue.wait_again(ticket, now)

    # --- the line ------------------------------------------------------------------------------------------------
    def sweep(self) -> None:
        """Each second: forget tickets without polls, take back uncollected grants, serve every line."""
        now = self._clock.now()
        for ticket in self.queue.expire(now, self._is_running):
            if ticket.phase is Phase.GRANTED and self._workers.get(ticket.worker_id) is not None:
                self._workers.load(ticket.worker_id).finish(ticket.request_idx, now)
        for request_idx in list(self.queue.granted):
            granted = self.queue.get(request_idx)
            if granted is not None and now - max(granted.phase_at, granted.polled_at) > GRANT_S:
                if self._workers.get(granted.worker_id) is not None:
                    self._workers.load(granted.worker_id).finish(request_idx, now)
                granted.uncollected = True
                self.queue.wait_again(granted, now)
        for endpoint_id in self.turns.endpoints():
            self.turns.serve(endpoint_id, now)

    # --- what others ask -----------------------------------------------------------------------------------------
    def new_number(self) -> int:
        """A fresh `request_idx`."""
        return self._numbers.next()

    def why(self, endpoint_id: int) -> str:
        """One sentence: why a request waits here, and what comes next."""
        if not self._owns(endpoint_id):
            return ELSEWHERE
        return self.reasons.get(endpoint_id, "no decision has been made yet; the first comes within a second")

    def demand(self, endpoint_id: int) -> Demand:
        """What waits and what arrives, for the autoscaler."""
        now = self._clock.now()
        backlog = self._backlogs.get(endpoint_id, Backlog())
        oldest = self.queue.oldest_arrival(endpoint_id)
        arrivals = [at for at in (oldest, backlog.oldest_at if backlog.jobs else None) if at is not None]
        waiting, cost = self.turns.waiting(endpoint_id, now)
        return Demand(
            waiting=waiting + backlog.jobs,
            waiting_cost=cost + backlog.cost,
            oldest_wait_s=max(0.0, now - min(arrivals)) if arrivals else 0.0,
            rates=self.meters.rates(endpoint_id, now),
        )

    # --- inside --------------------------------------------------------------------------------------------------
    def _is_running(self, ticket: RouteTicket) -> bool:
        if self._workers.get(ticket.worker_id) is None:
            return False
        return self._workers.load(ticket.worker_id).booking(ticket.request_idx) is not None

    def _known(self, request: TakeRequest, now: float) -> RouteTicket | None:
        if request.request_idx <= 0:
            return None
        ticket = self.queue.get(request.request_idx)
        if ticket is not None:
            # Another key's number says nothing about that key's request: it is simply a new one.
            is_ours = ticket.scope == request.scope and ticket.endpoint_id == request.endpoint_id
            return ticket if is_ours or not ticket.scope else None
        worker = self._workers.get(self._adopted.get(request.request_idx, 0))
        if worker is not None and worker.endpoint_id == request.endpoint_id:
            del self._adopted[request.request_idx]
            ticket = self._ticket(request, request.request_idx, now)
            ticket.phase = Phase.ASSIGNED
            ticket.worker_id = worker.id
            self.queue.adopt(ticket)
            return ticket
        return None

    def _fresh(self, request: TakeRequest, now: float) -> RouteTicket:
        number = request.request_idx
        is_theirs = number > 0 and not self._numbers.is_ahead(number) and self.queue.get(number) is None
        return self._ticket(request, number if is_theirs else self._numbers.next(), now)

    def _ticket(self, request: TakeRequest, number: int, now: float) -> RouteTicket:
        # A number from before a restart keeps its place; any other unknown one goes to the end of the line.
        is_old = 0 < number < self._numbers.first
        return RouteTicket(
            request_idx=number,
            endpoint_id=request.endpoint_id,
            scope=request.scope,
            want=Want(request.cost, request.models),
            shape=request.shape,
            order=number if is_old or number != request.request_idx else self._numbers.next(),
            arrived_at=now,
            polled_at=now,
            replay_timeout=request.replay_timeout,
            held=request.held,
        )

    def _returned(self, ticket: RouteTicket, now: float) -> None:
        """The caller is back although it had a worker."""
        was_quick = now - ticket.phase_at < STRIKE_WINDOW_S / 10
        ticket.returns = ticket.returns + 1 if was_quick else 0
        if ticket.returns:
            ticket.not_before = now + min(_THROTTLE_CAP_S, _THROTTLE_FIRST_S * 2 ** (ticket.returns - 1))
        worker = self._workers.get(ticket.worker_id)
        if ticket.phase is Phase.ASSIGNED and worker is not None:
            load = self._workers.load(worker.id)
            booking = load.booking(ticket.request_idx)
            is_listed = booking is not None and booking.seen and load.is_open
            # A caller whose own limit is shorter than the job comes back again and again, and never at once.
            if is_listed and (not was_quick or now - ticket.rejoined_at > REJOIN_S):
                ticket.rejoined_at = now
                self.queue.leave(ticket, Phase.GRANTED, worker.id, now)
                return
            load.finish(ticket.request_idx, now)
            ticket.exclude(worker.id, now + EXCLUDED_S)
            if was_quick:
                self._strike(worker.id, ticket.request_idx, now)
        elif ticket.preferred and worker is not None and self._workers.load(worker.id).is_open:
            # It finished there: the same worker replays the answer instead of making it again.
            ticket.preferred = 0
            self._workers.book(worker.id, Booking(request_idx=ticket.request_idx, cost=0.0, at=now, held=ticket.held))
            self.queue.leave(ticket, Phase.GRANTED, worker.id, now)
            return
        self.queue.wait_again(ticket, now)

    def _strike(self, worker_id: int, request_idx: int, now: float) -> None:
        striker, at = self._strikes.get(worker_id, (request_idx, 0.0))
        self._strikes[worker_id] = request_idx, now
        self._workers.suspect(worker_id, now)
        # One caller who reaches nobody says little about a worker, however often it says so.
        if striker != request_idx and now - at < STRIKE_WINDOW_S:
            self._workers.quarantine(worker_id, now)

    def _has_reached(self, worker_id: int, working: tuple[int, ...], strike: tuple[int, float]) -> bool:
        """Another request was sent there since the strike, and arrived."""
        striker, at = strike
        tickets = (self.queue.get(request_idx) for request_idx in working if request_idx != striker)
        return any(one is not None and one.worker_id == worker_id and one.phase_at >= at for one in tickets)

    def _placed(self, request: TakeRequest, ticket: RouteTicket, now: float) -> Placed:
        worker = self._workers.known(ticket.worker_id)
        return Placed(worker_id=worker.id, answer=self._ready(request, ticket, worker, now))

    def _ready(self, request: TakeRequest, ticket: RouteTicket, worker: Worker, now: float) -> RouteReady:
        claims = TicketClaims(
            url=worker.url,
            endpoint=request.endpoint_name,
            cost=request.cost,
            reqnum=self._reqnums.next(),
            request_idx=ticket.request_idx,
            exp=now + TICKET_LIFETIME_S,
            sub=request.scope,
            incarnation=worker.incarnation,
        )
        return self._tickets.admit(claims, self._ids.request_id())

    def _waits(self, request: TakeRequest, ticket: RouteTicket, hold: Hold | None) -> Waits:
        reason = self.why(request.endpoint_id)
        if hold is not None:
            reason = f"{hold.reason}; its next request gets its turn in {hold.wait_s:.1f} s"
        answer = RouteWaiting(
            endpoint=request.endpoint_name,
            status=state_counts(self._workers.of_endpoint(request.endpoint_id)),
            request_idx=ticket.request_idx,
            reason=reason,
            request_id=self._ids.request_id(),
        )
        return Waits(ticket=ticket, answer=answer, retry_after_s=hold.wait_s if hold is not None else 0.0)

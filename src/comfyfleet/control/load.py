"""What one worker has on its hands, as routing sees it: booked requests, in load units.

A request is booked when it is routed. It counts until the worker reports it finished, until it vanishes from the list
of what the worker is working on, or, if it never showed up there, for `BOOKING_GRACE_S`. A held booking (a leased
durable job) only ends by a report or by its holder. `backlog` is what routing ranks by; the simulator moves the same
numbers in virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

# A ticket that was never used: its client went away between the route answer and the worker.
BOOKING_GRACE_S = 10.0
UNKNOWN_COST = 100.0


class Booking(msgspec.Struct, kw_only=True, gc=False):
    """One request on one worker. seen: the worker has listed it. swap: load units lost to loading its models first.

    One is kept with every ticket (see `route_queue` for `gc=False`).
    """

    request_idx: int
    cost: float
    at: float
    seen: bool = False
    held: bool = False
    models: frozenset[str] = frozenset()
    swap: float = 0.0

    @property
    def work(self) -> float:
        return self.cost + self.swap


class WorkerLoad:
    """Numbers that routing reads for every request, so they are kept up to date instead of summed up.

    score: load units per second, already corrected and reduced where the worker is doubted. is_open: may get work.
    warm: model names in its memory. swap_s: what loading a model that is not warm costs it.
    """

    __slots__ = (
        "_booked_cost",
        "_bookings",
        "_extra_cost",
        "_has_sessions",
        "_head_since",
        "_tail_models",
        "is_open",
        "last_work_at",
        "score",
        "swap_s",
        "warm",
    )

    def __init__(self, *, score: float = 0.0, is_open: bool = False, swap_s: float = 0.0) -> None:
        self.score = score
        self.is_open = is_open
        self.swap_s = swap_s
        self.warm: frozenset[str] = frozenset()
        self.last_work_at = 0.0  # when it last had a request, epoch s; 0 never
        self._bookings: dict[int, Booking] = {}
        self._booked_cost = 0.0
        self._tail_models: frozenset[str] = frozenset()  # of the request booked last
        self._extra_cost = 0.0  # sessions: load that no ticket explains
        self._has_sessions = False  # even of cost 0
        self._head_since = 0.0  # when the request at the head probably began to run

    @property
    def count(self) -> int:
        """Requests on the worker, as far as known."""
        return len(self._bookings)

    @property
    def booked_cost(self) -> float:
        """Load units of those requests and of sessions."""
        return self._booked_cost + self._extra_cost

    @property
    def is_leased(self) -> bool:
        """Somebody's work is there, or may arrive: such a worker is never stopped."""
        return bool(self._bookings) or self._has_sessions

    def is_warm(self, models: frozenset[str]) -> bool:
        """These models will be in memory when another request begins: they are now, and what is booked last keeps them.

        Where the last booked request needs others, both must be in memory now to be believed to fit together.
        """
        if not self._bookings:
            return models <= self.warm
        tail = self._tail_models
        if not tail:
            return models <= self.warm
        return models <= tail or (models <= self.warm and tail <= self.warm)

    def requests(self) -> Iterable[int]:
        return self._bookings.keys()

    def booking(self, request_idx: int) -> Booking | None:
        return self._bookings.get(request_idx)

    def backlog(self, now: float) -> float:
        """Load units still to do: what is booked, less what the request at the head has probably done by now."""
        total = self._booked_cost + self._extra_cost
        if not self._bookings or total <= 0:
            return total
        head = next(iter(self._bookings.values()))
        return total - min(head.work, max(0.0, (now - self._head_since) * self.score))

    def book(self, booking: Booking) -> None:
        """Add one; the same request again replaces its booking."""
        self.finish(booking.request_idx, booking.at)
        if not self._bookings:
            self._head_since = booking.at
        if booking.models and self.swap_s and not self.is_warm(booking.models):
            booking.swap = self.swap_s * self.score
        self._bookings[booking.request_idx] = booking
        self._booked_cost += booking.work
        self._tail_models = booking.models
        self.last_work_at = booking.at

    def finish(self, request_idx: int, now: float) -> Booking | None:
        """Remove one; None if it was not there."""
        booking = self._bookings.pop(request_idx, None)
        if booking is not None:
            self._booked_cost = self._booked_cost - booking.work if self._bookings else 0.0
            self._head_since = self.last_work_at = now
        return booking

    def reconcile(self, working: frozenset[int], *, cur_load: float, working_count: int, now: float) -> list[int]:
        """Take a worker's own list over ours. Returns the requests it had that we did not know (adopted now)."""
        for request_idx in [idx for idx in self._bookings if idx not in working]:
            booking = self._bookings[request_idx]
            is_unused = not booking.seen and now - booking.at > BOOKING_GRACE_S
            if (booking.seen or is_unused) and not booking.held:
                self.finish(request_idx, now)
        known_cost = 0.0
        for request_idx in working:
            if (known := self._bookings.get(request_idx)) is not None:
                known.seen = True
                known_cost += known.cost
        adopted = sorted(idx for idx in working if idx not in self._bookings)
        if adopted:
            unexplained = cur_load - known_cost
            share = unexplained / len(adopted) if unexplained > 0 else UNKNOWN_COST
            for request_idx in adopted:
                self.book(Booking(request_idx=request_idx, cost=share, at=now, seen=True))
                known_cost += share
        # Only where the worker counts more requests than it lists are there sessions to explain the difference.
        self._has_sessions = working_count > len(working)
        self._extra_cost = max(0.0, cur_load - known_cost) if self._has_sessions else 0.0
        return adopted

    def clear(self) -> list[int]:
        """The worker is gone; returns what it had."""
        lost = list(self._bookings)
        self._bookings.clear()
        self._booked_cost = self._extra_cost = 0.0
        self._has_sessions = False
        return lost

"""Which replica owns which endpoint: the rules, as pure functions of what the store says and a monotonic time. No I/O.

A replica holds one lease, on itself, and owns endpoints by rows that name it together with a fence, a number that grows
with each change of owner. Who is out of its lease is struck off the roll for good (an id is never used twice) and its
endpoints are free. `Tenure` is what one replica may believe about itself. It counts its lease from before the renewal
was sent, on its own monotonic clock, and takes a margin off: so it stops acting before the database, whose clock
decides, lets anybody else begin. Wall clocks are compared nowhere. Who runs this: `control.replicas`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import msgspec

# Long enough for a database that restarts or a process that is paged in; short enough that a dead owner's endpoints
# are served elsewhere within 5 s.
LEASE_S = 3.0
RENEW_EVERY_S = 0.75
# For clocks that run at different speeds, and for work that began just before the end.
MARGIN_S = 0.5
# An endpoint moves for the sake of balance only from a replica that has at least so many more than another.
IMBALANCE = 2


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """A live control plane. url: where the others reach it. fleet: whose workers it can start, "" nobody's."""

    id: str
    url: str
    fleet: str = ""


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """A row: the endpoint's owner and fence. replica_id may name the dead, or nobody ("")."""

    endpoint_id: int
    replica_id: str
    fence: int


class Roll(msgspec.Struct, frozen=True, kw_only=True):
    """The store's answer to a renewal, of one moment. is_present: the asker's lease stood, and stands again.

    version: grows with every change of a record, so that caches know when they are old.
    """

    is_present: bool
    replicas: tuple[Replica, ...] = ()
    deeds: tuple[Deed, ...] = ()
    version: int = 0

    def owners(self) -> dict[int, Replica]:
        """The living owner of each endpoint that has one."""
        alive = {replica.id: replica for replica in self.replicas}
        return {deed.endpoint_id: alive[deed.replica_id] for deed in self.deeds if deed.replica_id in alive}


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """Shown to the store with a write that only the endpoint's owner may make."""

    endpoint_id: int
    number: int


class NotOwner(Exception):
    """This replica does not own the endpoint, or not any more: leave it alone."""


class Ownership(Protocol):
    """What the rest of the control plane asks before it acts."""

    @property
    def is_shared(self) -> bool:
        """Others may own endpoints of the same database."""
        ...

    def owns(self, endpoint_id: int) -> bool:
        """May this replica act for the endpoint at this instant?"""
        ...

    def fence(self, endpoint_id: int) -> Fence | None:
        """For the store; None where nobody else could write. Raises NotOwner."""
        ...


class SoleOwner:
    """The only control plane of its database: everything is its own, and nothing needs asking."""

    is_shared = False

    def owns(self, endpoint_id: int) -> bool:
        del endpoint_id
        return True

    def fence(self, endpoint_id: int) -> Fence | None:
        del endpoint_id
        return None


SOLE_OWNER = SoleOwner()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """take: free endpoints, each with the fence that was seen (0: no row yet). give: to be let go."""

    take: tuple[tuple[int, int], ...] = ()
    give: tuple[int, ...] = ()


def plan(roll: Roll, me: str, endpoint_ids: Iterable[int]) -> Plan:
    """What to take and what to give, so that every endpoint has an owner and the load is spread by their number.

    Free endpoints are dealt out, each to whoever has the fewest; all replicas deal alike, and where they saw different
    rolls the store's guard lets one of them win.
    """
    owners = {endpoint_id: owner.id for endpoint_id, owner in roll.owners().items()}
    fences = {deed.endpoint_id: deed.fence for deed in roll.deeds}
    wanted = sorted(set(endpoint_ids))
    counts = {replica.id: 0 for replica in roll.replicas}
    for endpoint_id in wanted:
        if endpoint_id in owners:
            counts[owners[endpoint_id]] += 1
    if me not in counts:
        return Plan()
    take = []
    for endpoint_id in wanted:
        if endpoint_id not in owners:
            dealt_to = min(counts, key=lambda replica_id: (counts[replica_id], replica_id))
            counts[dealt_to] += 1
            if dealt_to == me:
                take.append((endpoint_id, fences.get(endpoint_id, 0)))
    if take:
        return Plan(take=tuple(take))
    mine = [endpoint_id for endpoint_id in wanted if owners.get(endpoint_id) == me]
    surplus = _surplus(counts, me)
    return Plan(give=tuple(mine[len(mine) - surplus :]) if surplus else ())


def _surplus(counts: Mapping[str, int], me: str) -> int:
    """How many to let go of at once: a quarter of what is too much, so that balance comes in steps."""
    if counts[me] - min(counts.values()) < IMBALANCE:
        return 0
    even = -(-sum(counts.values()) // len(counts))
    return max(1, (counts[me] - even) // 4)


class Tenure:
    """One replica's belief about its own lease and endpoints. `now` is its own monotonic clock, everywhere."""

    def __init__(self, replica_id: str) -> None:
        self.id = replica_id
        self._until = float("-inf")
        self._fences: dict[int, int] = {}

    def is_standing(self, now: float) -> bool:
        """Within the lease, the margin taken off."""
        return now < self._until

    def owns(self, endpoint_id: int, now: float) -> bool:
        return now < self._until and endpoint_id in self._fences

    def fence(self, endpoint_id: int) -> Fence | None:
        """Whatever the lease is worth by now: the store decides."""
        number = self._fences.get(endpoint_id)
        return None if number is None else Fence(endpoint_id=endpoint_id, number=number)

    def held(self) -> dict[int, int]:
        """Endpoint to fence."""
        return dict(self._fences)

    def attended(self, roll: Roll, sent_at: float) -> list[int]:
        """Take the answer to a renewal sent at `sent_at`; returns the endpoints that are not ours any more."""
        if not roll.is_present:
            return self.lost()
        self._until = max(self._until, sent_at + LEASE_S - MARGIN_S)
        ours = {deed.endpoint_id: deed.fence for deed in roll.deeds if deed.replica_id == self.id}
        gone = [endpoint_id for endpoint_id, number in self._fences.items() if ours.get(endpoint_id) != number]
        for endpoint_id in gone:
            del self._fences[endpoint_id]
        return gone

    def lost(self) -> list[int]:
        """The lease ran out: nothing is ours."""
        self._until = float("-inf")
        gone, self._fences = list(self._fences), {}
        return gone

    def took(self, fence: Fence) -> None:
        """The store gave us an endpoint, and what was known of it is loaded."""
        self._fences[fence.endpoint_id] = fence.number

    def gives(self, endpoint_ids: Collection[int]) -> list[Fence]:
        """Stop acting for these, at once; the store is told afterwards."""
        given = [endpoint_id for endpoint_id in endpoint_ids if endpoint_id in self._fences]
        return [Fence(endpoint_id=endpoint_id, number=self._fences.pop(endpoint_id)) for endpoint_id in given]

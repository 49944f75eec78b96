"""Who owns which endpoint: the plan as a table, and the promise that no two replicas ever act for one endpoint."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyfleet.control.ownership import LEASE_S, Deed, Fence, Plan, Replica, Roll, Tenure, plan


def a_roll(replicas: str, owned: dict[int, str] | None = None) -> Roll:
    """Replicas by letter; endpoint to its owner's letter, fence 10 + endpoint."""
    return Roll(
        is_present=True,
        replicas=tuple(Replica(id=name, url=f"http://{name}") for name in replicas),
        deeds=tuple(
            Deed(endpoint_id=number, replica_id=name, fence=10 + number) for number, name in (owned or {}).items()
        ),
    )


@pytest.mark.parametrize(
    ("why", "roll", "endpoints", "expected"),
    [
        ("a lone replica takes all", a_roll("a"), [1, 2, 3], Plan(take=((1, 0), (2, 0), (3, 0)))),
        ("two share what is new", a_roll("ab"), [1, 2, 3], Plan(take=((1, 0), (3, 0)))),
        ("a dead owner's are free, at their fence", a_roll("a", {1: "dead"}), [1], Plan(take=((1, 11),))),
        ("a released one is free", a_roll("a", {1: ""}), [1], Plan(take=((1, 11),))),
        ("whoever has fewer gets what is free", a_roll("ab", {1: "a", 2: "a", 3: "dead"}), [1, 2, 3], Plan()),
        ("a newcomer is given some", a_roll("ab", {1: "a", 2: "a"}), [1, 2], Plan(give=(2,))),
        ("one more than another is balance", a_roll("ab", {1: "a", 2: "a", 3: "b"}), [1, 2, 3], Plan()),
        ("a deleted endpoint counts for nothing", a_roll("ab", {1: "a", 2: "a"}), [1], Plan()),
        ("off the roll, nothing is decided", a_roll("b"), [1], Plan()),
    ],
)
def test_what_replica_a_does(why, roll, endpoints, expected):
    assert plan(roll, "a", endpoints) == expected, why


@given(st.integers(1, 5), st.integers(0, 60), st.data())
def test_replicas_that_follow_their_plans_end_balanced_and_at_rest(replicas, endpoints, data):
    names = "abcde"[:replicas]
    owned = {number: data.draw(st.sampled_from([*names, "dead", ""])) for number in range(1, endpoints + 1)}
    for _ in range(200):
        roll = a_roll(names, owned)
        plans = {name: plan(roll, name, owned) for name in names}
        taken = [endpoint_id for one in plans.values() for endpoint_id, _ in one.take]
        assert len(taken) == len(set(taken)), "two would take the same"
        for name, one in plans.items():
            owned |= {endpoint_id: name for endpoint_id, _ in one.take} | dict.fromkeys(one.give, "")
        if all(one == Plan() for one in plans.values()):
            break
    counts = [list(owned.values()).count(name) for name in names]
    assert sum(counts) == endpoints
    assert max(counts) - min(counts) <= 1


class ModelStore:
    """What `store.ownership_table` promises, in a few lines; its clock is the true time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.leases: dict[str, float] = {}
        self.deeds: dict[int, tuple[str, int]] = {}

    def attend(self, replica_id: str) -> Roll:
        is_present = self.leases.get(replica_id, -1.0) > self.now
        if is_present:
            self.leases[replica_id] = self.now + LEASE_S
        self.leases = {name: until for name, until in self.leases.items() if until > self.now}
        return Roll(
            is_present=is_present,
            replicas=tuple(Replica(id=name, url="") for name in sorted(self.leases)),
            deeds=tuple(
                Deed(endpoint_id=number, replica_id=name, fence=fence) for number, (name, fence) in self.deeds.items()
            ),
        )

    def take(self, replica_id: str, wanted) -> list[Fence]:
        taken = []
        for endpoint_id, seen in wanted:
            owner, fence = self.deeds.get(endpoint_id, ("", 0))
            if fence == seen and owner not in self.leases:
                self.deeds[endpoint_id] = (replica_id, fence + 1)
                taken.append(Fence(endpoint_id=endpoint_id, number=fence + 1))
        return taken

    def release(self, fences) -> None:
        for fence in fences:
            if self.deeds[fence.endpoint_id][1] == fence.number:
                self.deeds[fence.endpoint_id] = ("", fence.number)

    def accepts(self, fence: Fence) -> bool:
        return self.deeds[fence.endpoint_id][1] == fence.number


ENDPOINTS = (1, 2, 3)


class ModelReplica:
    """The loop of `control.replicas`, one step of it at a time: whatever is between two steps may take for ever."""

    def __init__(self, store: ModelStore, names, *, rate: float, offset: float) -> None:
        self.store, self.names, self.rate, self.offset = store, names, rate, offset
        self.start()

    def start(self) -> None:
        """A new life: nothing is remembered."""
        self.tenure = Tenure(next(self.names))
        self.steps = self._life()

    def clock(self) -> float:
        """Its monotonic clock: not the store's, and not at its speed."""
        return self.store.now * self.rate + self.offset

    def _life(self):
        while True:
            self.store.leases[self.tenure.id] = self.store.now + LEASE_S
            yield
            while True:
                sent_at = self.clock()
                yield
                roll = self.store.attend(self.tenure.id)
                yield
                self.tenure.attended(roll, sent_at)
                if not roll.is_present:
                    self.tenure = Tenure(next(self.names))
                    break
                decided = plan(roll, self.tenure.id, ENDPOINTS)
                yield
                if decided.take:
                    taken = self.store.take(self.tenure.id, decided.take)
                    yield
                    for fence in taken:
                        self.tenure.took(fence)
                if decided.give:
                    given = self.tenure.gives(decided.give)
                    yield
                    self.store.release(given)

    def acts_for(self) -> list[int]:
        return [endpoint_id for endpoint_id in ENDPOINTS if self.tenure.owns(endpoint_id, self.clock())]


MOVES = st.tuples(
    st.integers(0, 3),  # which replica
    st.sampled_from(["step"] * 12 + ["die"]),
    st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.75, 1.2, 2.4, 2.6, 3.0, 3.5, 9.0]),  # how long until the next move
)
RATES = st.floats(0.93, 1.07)  # a clock that is 7 % wrong: the margin is for less than twice that


@settings(max_examples=400, deadline=None)
@given(st.lists(MOVES, max_size=150), st.tuples(RATES, RATES, RATES), st.tuples(*[st.floats(-1e6, 1e6)] * 3))
def test_never_two_owners_act_for_one_endpoint(moves, rates, offsets):
    store, names = ModelStore(), (f"r{number}" for number in itertools.count())
    replicas = [
        ModelReplica(store, names, rate=rate, offset=offset) for rate, offset in zip(rates, offsets, strict=True)
    ]
    for which, move, then_s in moves:
        replica = replicas[which % len(replicas)]
        if move == "die":
            replica.start()
        else:
            next(replica.steps)
        acting = [endpoint_id for one in replicas for endpoint_id in one.acts_for()]
        assert len(acting) == len(set(acting)), "two replicas act for one endpoint"
        for one in replicas:
            for endpoint_id in one.acts_for():
                fence = one.tenure.fence(endpoint_id)
                assert fence is not None
                assert store.accepts(fence), "an owner that acts is the one the store knows"
        store.now += then_s


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_every_endpoint_is_owned_again_soon_after_its_owner_died(seed, alive):
    store, names = ModelStore(), (f"r{number}" for number in itertools.count())
    replicas = [ModelReplica(store, names, rate=1.0, offset=float(number * seed)) for number in range(alive + 1)]

    def run(of, seconds: float) -> None:
        for _ in range(int(seconds / 0.1)):
            for one in of:
                next(one.steps)
            store.now += 0.1

    run(replicas, 5.0)
    survivors = replicas[1:]
    run(survivors, LEASE_S + 1.0)
    assert sorted(endpoint_id for one in survivors for endpoint_id in one.acts_for()) == list(ENDPOINTS)

"""A key's limits over several control planes on one store: what one lets through, the others take off."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyfleet.control.auth import Principal
from comfyfleet.control.backlog import Backlog
from comfyfleet.control.jobs import Waiting
from comfyfleet.control.limits import DAY_S, Limits
from comfyfleet.control.promises import Promises
from comfyfleet.control.records import KeyLimits, ScopeUse
from comfyfleet.control.shared_use import SharedUse
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.control.workers import Workers
from comfyfleet.wire.errors import TooManyRequests
from support.stored_jobs import NOW, a_job

pytestmark = pytest.mark.anyio
RATE, BURST = 5.0, 10.0
LIMITS = KeyLimits(requests_per_s=RATE, burst=BURST, gpu_seconds_per_day=100.0)
KEY = Principal(scope="key:1", scopes=frozenset({"jobs"}), limits=LIMITS)


class Sums:
    """The store's sums, as `share_use` keeps them."""

    def __init__(self) -> None:
        self.sums: dict[str, ScopeUse] = {}

    async def share_use(self, used):
        for one in used:
            known = self.sums.get(one.scope, ScopeUse(scope=one.scope))
            self.sums[one.scope] = ScopeUse(
                scope=one.scope, requests=known.requests + one.requests, seconds=known.seconds + one.seconds
            )
        return list(self.sums.values())


def replicas(count: int, store, clock) -> list[tuple[Limits, SharedUse]]:
    made = []
    for _ in range(count):
        limits = Limits(lambda _scope: LIMITS)
        made.append((limits, SharedUse(store=store, limits=limits, clock=clock)))
    return made


def passed(limits: Limits, now: float) -> int:
    """How many of ten requests are let through."""
    count = 0
    for _ in range(10):
        try:
            limits.admit(KEY, 1, now)
        except TooManyRequests:
            break
        count += 1
    return count


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(2, 4),
    turns=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=20, max_size=40),
)
async def test_together_they_let_no_more_through_than_the_stated_bound(clock, count, turns):
    """However a load balancer spreads the calls: one bucket's worth, and once what the others let through unheard."""
    made, total, began = replicas(count, Sums(), clock), 0, clock.now()
    for _, shared in made:
        await shared.step()
    for turn in turns:
        for chosen in turn:
            total += passed(made[chosen % count][0], clock.now())
        for _, shared in made:
            await shared.step()
        clock.jump(1.0)
        allowed = (clock.now() - began) * RATE + BURST + (count - 1) * (BURST + RATE)
        assert total <= allowed + 1e-6


async def test_a_rate_that_one_used_up_is_used_up_at_the_other_and_comes_back(tmp_path, clock):
    store = open_sqlite(tmp_path / "control.sqlite3")
    (one, tells), (two, hears) = replicas(2, store, clock)
    await tells.step()
    await hears.step()
    assert passed(one, clock.now()) == BURST

    await tells.step()
    await hears.step()
    assert passed(two, clock.now()) == 0
    clock.jump(1.0)
    assert passed(two, clock.now()) == RATE
    await store.close()


async def test_a_days_gpu_seconds_are_one_sum_and_nothing_is_counted_twice(tmp_path, clock):
    store = open_sqlite(tmp_path / "control.sqlite3")
    await store.share_use([ScopeUse(scope=KEY.scope, seconds=1000.0)])  # before they started: the ledger's to know
    (one, tells), (two, hears) = replicas(2, store, clock)
    for shared in (tells, hears):
        await shared.step()
    one.used_seconds(KEY.scope, 60.0, clock.now())
    two.used_seconds(KEY.scope, 30.0, clock.now())
    for shared in (tells, hears, tells, hears):
        await shared.step()
    for limits in (one, two):
        limits.admit_seconds(KEY, clock.now(), seconds=10.0)
        with pytest.raises(TooManyRequests):
            limits.admit_seconds(KEY, clock.now(), seconds=11.0)
    clock.jump(DAY_S + 1)
    one.admit_seconds(KEY, clock.now(), seconds=100.0)
    await store.close()


async def test_what_could_not_be_told_is_told_with_the_next_word(clock):
    sums = Sums()
    ((limits, shared),) = replicas(1, sums, clock)
    await shared.step()
    limits.used_seconds(KEY.scope, 5.0, clock.now())
    told = sums.share_use

    async def away(_used):
        raise ConnectionLost("away")

    sums.share_use = away
    with pytest.raises(ConnectionLost):
        await shared.step()
    limits.used_seconds(KEY.scope, 2.0, clock.now())
    sums.share_use = told
    await shared.step()
    assert sums.sums[KEY.scope].seconds == 7.0


async def test_open_jobs_promise_seconds_by_their_endpoints_usual_score():
    backlog, workers = Backlog(), Workers()
    for number, score in ((1, 2.0), (2, 4.0), (3, 50.0)):
        state = {"id": number, "endpoint_id": 1, "group_id": 1, "mtoken": "m", "created_at": NOW}
        workers.add(Worker(**state, state=WorkerState.IDLE, measured_perf=score), NOW)
    promises = Promises(backlog, workers)
    waiting = [
        Waiting(endpoint_id=1, scope="key:a", jobs=3, cost=400.0, oldest_at=NOW),
        Waiting(endpoint_id=2, scope="key:a", jobs=1, cost=7.0, oldest_at=NOW),
        Waiting(endpoint_id=1, scope="key:b", jobs=1, cost=100.0, oldest_at=NOW),
    ]
    backlog.begin_sync()
    backlog.replace(waiting)
    backlog.replace_running([a_job("r1", endpoint_id=1), a_job("r2", endpoint_id=1, scope="key:b")])

    assert promises.of_scope("key:a") == 400.0 / 4 + 7.0 / 1 + 100.0 / 4
    backlog.ended(1, "key:a", 100.0)
    backlog.began(1, "key:a", 100.0)
    backlog.ended(1, "key:a", 100.0)
    assert promises.of_scope("key:a") == 300.0 / 4 + 7.0
    assert promises.of_scope("key:c") == 0

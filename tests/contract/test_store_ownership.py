"""Leases of replicas and deeds of endpoints on both databases: who may take, renew and write, and who may not."""

from __future__ import annotations

import contextlib
from functools import partial

import anyio
import pytest

from comfyfleet.control.jobs import Job, Lease, rank
from comfyfleet.control.ownership import Fence, Replica
from comfyfleet.control.records import DecisionRow, Endpoint, ScopeUse, WorkerRow
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.store.ownership_table import Fenced
from comfyfleet.control.store.postgres import PostgresConnection
from comfyfleet.control.store.store import open_postgres
from comfyfleet.wire.jobs import JobStatus

pytestmark = pytest.mark.anyio
FOR_EVER_S = 1e6
NOW = 1_700_000_000.0


async def enrolled(store, *names: str, lease_s: float = FOR_EVER_S) -> None:
    for name in names:
        await store.enrol(Replica(id=name, url=f"http://{name}:1", fleet="f"), lease_s)


async def until_over(store, name: str) -> None:
    """Wait out a lease that nobody renews, by the database's own clock."""
    with anyio.fail_after(60):
        while name in [replica.id for replica in (await store.attend("nobody", 1.0)).replicas]:  # noqa: ASYNC110
            await anyio.sleep(0.02)


async def test_the_roll_names_the_living_and_what_they_own(store):
    await enrolled(store, "a", "b")
    assert await store.take("a", [(1, 0), (2, 0)]) == [
        Fence(endpoint_id=1, number=1),
        Fence(endpoint_id=2, number=1),
    ]
    roll = await store.attend("a", FOR_EVER_S)
    assert roll.is_present
    assert roll.replicas == (
        Replica(id="a", url="http://a:1", fleet="f"),
        Replica(id="b", url="http://b:1", fleet="f"),
    )
    assert {number: owner.id for number, owner in roll.owners().items()} == {1: "a", 2: "a"}


async def test_a_living_owner_keeps_its_endpoint(store):
    await enrolled(store, "a", "b")
    await store.take("a", [(1, 0)])
    assert await store.take("b", [(1, 0)]) == []
    assert await store.take("b", [(1, 1)]) == []


async def test_an_endpoint_whose_owner_left_is_taken_once_with_a_new_fence(store):
    await enrolled(store, "a", "b", "c")
    await store.take("a", [(1, 0)])
    await store.leave("a")
    assert await store.take("b", [(1, 1)]) == [Fence(endpoint_id=1, number=2)]
    assert await store.take("c", [(1, 1)]) == []


async def test_of_many_that_take_at_once_one_wins(store):
    names = [f"r{number}" for number in range(8)]
    await enrolled(store, *names)
    winners = []

    async def take(name: str) -> None:
        winners.extend([name] * len(await store.take(name, [(1, 0)])))

    async with anyio.create_task_group() as racing:
        for name in names:
            racing.start_soon(take, name)
    assert len(winners) == 1


async def test_a_released_endpoint_is_free_and_only_its_owner_can_release_it(store):
    await enrolled(store, "a", "b")
    (fence,) = await store.take("a", [(1, 0)])
    await store.release([Fence(endpoint_id=1, number=7)])
    assert await store.take("b", [(1, 1)]) == []
    await store.release([fence])
    assert await store.take("b", [(1, 1)]) == [Fence(endpoint_id=1, number=2)]


async def test_a_lease_that_is_over_is_over_for_good(store):
    await enrolled(store, "late", lease_s=0.05)
    await enrolled(store, "b")
    await store.take("late", [(1, 0)])
    await until_over(store, "late")
    assert not (await store.attend("late", FOR_EVER_S)).is_present
    assert not (await store.attend("late", FOR_EVER_S)).is_present
    assert await store.take("b", [(1, 1)]) == [Fence(endpoint_id=1, number=2)]


async def test_a_renewed_lease_stands(store):
    await enrolled(store, "a", lease_s=30.0)
    for _ in range(3):
        assert (await store.attend("a", 30.0)).is_present
    assert [replica.id for replica in (await store.attend("b", 1.0)).replicas] == ["a"]


async def test_an_owner_of_yesterday_writes_nothing(store):
    await enrolled(store, "a", "b")
    (old,) = await store.take("a", [(1, 0)])
    await store.leave("a")
    (new,) = await store.take("b", [(1, 1)])
    job = Job(
        id="j1",
        endpoint_id=1,
        scope="s",
        status=JobStatus.QUEUED,
        priority=0,
        cost=1.0,
        rank=rank(NOW, 0),
        created_at=NOW,
        not_before=0.0,
        input="{}",
        digest="d",
    )
    await store.add_jobs([job])
    lease = Lease(
        job_id="j1", token="t", leased_at=NOW, expires_at=NOW, worker_id=1, worker_url="http://w", request_idx=1
    )
    row = WorkerRow(id=1, endpoint_id=1, workergroup_id=1, body="{}")
    decision = DecisionRow(id=1, endpoint_id=1, at=NOW, sentence="s", inputs="{}", outcome="{}")
    for write in (
        lambda fence: store.lease(lease, fence=fence),
        lambda fence: store.take_over("j1", old_token="t", token="u", expires_at=NOW, fence=fence),
        lambda fence: store.put(row, fence=fence),
        lambda fence: store.add_decision(decision, fence=fence),
        lambda fence: store.drop(WorkerRow, 1, fence=fence),
        lambda fence: store.webhook_out("j1", fence=fence),
        lambda fence: store.webhooks_due_again(1, fence=fence),
    ):
        with pytest.raises(Fenced):
            await write(old)
    assert (await store.job("j1")).status is JobStatus.QUEUED
    assert (await store.all(WorkerRow), await store.decisions(1)) == ([], [])
    assert (await store.lease(lease, fence=new)).lease_token == "t"
    await store.put(row, fence=new)
    await store.add_decision(decision, fence=new)
    assert await store.get(WorkerRow, 1) == row
    assert [found.id for found in await store.decisions(1)] == [1]


async def test_changes_of_records_are_counted_and_workers_are_not(store):
    before = await store.records_version()
    await store.put(WorkerRow(id=1, endpoint_id=1, workergroup_id=1, body="{}"))
    assert await store.records_version() == before
    await store.put(Endpoint(id=1, endpoint_name="comfy", created_at=NOW))
    await store.drop(Endpoint, 1)
    assert await store.records_version() == before + 2
    assert (await store.attend("nobody", 1.0)).version == before + 2


async def test_the_first_secret_of_a_name_is_everybodys(store):
    assert await store.secret("ticket") is None
    assert await store.agree_on_secret("ticket", "first") == "first"
    assert await store.agree_on_secret("ticket", "second") == "first"
    assert await store.secret("ticket") == "first"


@pytest.mark.slow
async def test_two_replicas_that_tell_of_one_job_at_once_are_both_heard(postgres_url):
    first, second = open_postgres(postgres_url), open_postgres(postgres_url)
    before = len(await first.events("shared", 1))
    try:
        async with anyio.create_task_group() as telling:
            for number in range(40):
                told = partial(second.add_event if number % 2 else first.add_event, "shared", data="{}", now=NOW)
                telling.start_soon(partial(told, kind="progress"))
        seqs = [event.seq for event in await first.events("shared", 1)]
        assert len(set(seqs)) == len(seqs) == before + 40
    finally:
        await first.close()
        await second.close()


def stops_between_two_statements(stopped: PostgresConnection) -> None:
    stopped.begin()
    stopped.change(HOLDS, {})


def stops_in_mid_pipeline(stopped: PostgresConnection) -> None:
    """The server has the statement, and waits for what else is sent."""
    raw = stopped._connected()
    raw.pipeline().__enter__()
    raw.execute("BEGIN")
    raw.execute(HOLDS)
    raw.pgconn.send_flush_request()
    raw.pgconn.flush()


HOLDS = "UPDATE replica SET url = 'http://held' WHERE id = 'stopped'"


@pytest.mark.slow
@pytest.mark.parametrize("stops", [stops_between_two_statements, stops_in_mid_pipeline])
async def test_a_process_that_stops_inside_a_transaction_does_not_hold_the_others_up(postgres_url, stops):
    store = open_postgres(postgres_url)
    stopped = PostgresConnection(postgres_url)
    try:
        await enrolled(store, "stopped")
        stops(stopped)
        with anyio.fail_after(60):
            while True:  # it waits for the row, but no longer than any transaction may: then it is for the next try
                with contextlib.suppress(ConnectionLost):
                    await store.leave("stopped")
                    break
        with pytest.raises(ConnectionLost):
            stopped.commit()
        assert (await store.attend("nobody", 1.0)).replicas == ()
    finally:
        stopped.close()
        await store.close()


async def test_what_keys_use_is_one_sum_of_all_replicas(store):
    async def use(number: int) -> None:
        scopes = ("key:b", "key:a") if number % 2 else ("key:a", "key:b")
        await store.share_use([ScopeUse(scope=scope, requests=1.0, seconds=0.5) for scope in scopes])

    async with anyio.create_task_group() as replicas:
        for number in range(8):
            replicas.start_soon(use, number)

    assert await store.share_use([]) == [
        ScopeUse(scope="key:a", requests=8.0, seconds=4.0),
        ScopeUse(scope="key:b", requests=8.0, seconds=4.0),
    ]

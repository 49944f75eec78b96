"""Many callers at once: their changes share statements and a commit, and each still gets its own answer."""

from __future__ import annotations

from functools import partial

import anyio
import anyio.to_thread
import psycopg
import pytest

from comfyfleet.control.jobs import JobFilter
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.wire.jobs import JobStatus
from support.stored_jobs import NOW, a_job, a_lease

pytestmark = pytest.mark.anyio


async def test_repeats_among_many_submits_at_once_meet_the_one_job_of_their_key(store):
    added = {}

    async def submit(number: int) -> None:
        job = a_job(f"j{number}", idempotency_key=f"k{number % 40}" if number % 3 else None)
        added[number] = (await store.add_jobs([job]))[0]

    async with anyio.create_task_group() as callers:
        for number in range(130):
            callers.start_soon(submit, number)

    by_key = {}
    for number, one in added.items():
        stored = await store.job(one.job.id)
        assert stored.idempotency_key == (f"k{number % 40}" if number % 3 else None)
        assert one.is_repeat == (one.job.id != f"j{number}")
        if number % 3:
            by_key.setdefault(number % 40, set()).add(one.job.id)
    assert all(len(ids) == 1 for ids in by_key.values())
    fresh = [one for one in added.values() if not one.is_repeat]
    assert len(await store.jobs(JobFilter(scope=None, limit=500))) == len(fresh)


async def test_of_many_ends_told_at_once_one_is_written(store):
    await store.add_jobs([a_job(f"j{number}") for number in range(5)])
    for number in range(4):
        await store.lease(a_lease(f"j{number}", token=f"t{number}"))
    won = []

    async def finish(number: int, caller: int) -> None:
        result = f'{{"by":{caller}}}'
        if await store.finish(
            f"j{number}", token=f"t{number}", status=JobStatus.COMPLETED, result=result, error=None, now=NOW
        ):
            won.append((number, result))

    async with anyio.create_task_group() as callers:
        for number in range(5):
            for caller in range(6):
                callers.start_soon(finish, number, caller)
                callers.start_soon(partial(store.add_event, f"j{number}", kind="progress", data="{}", now=NOW))

    assert sorted(number for number, _ in won) == [0, 1, 2, 3]
    for number, result in won:
        assert (await store.job(f"j{number}")).result == result
        events = await store.events(f"j{number}")
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events].count("completed") == 1
    assert (await store.job("j4")).status is JobStatus.QUEUED


@pytest.mark.slow
@pytest.mark.parametrize("store", ["postgres"], indirect=True)
async def test_callers_whose_connections_are_cut_lose_nothing_and_store_nothing_twice(store, postgres_url):
    done, cuts = [], []
    one_at_a_time = anyio.CapacityLimiter(1)  # two would cut each other

    def cut() -> None:
        with psycopg.connect(postgres_url, autocommit=True) as raw:
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            cuts.extend(raw.execute(f"{others} AND backend_type = 'client backend'").fetchall())

    async def surely(change):
        while True:
            try:
                return await change()
            except ConnectionLost:
                await anyio.sleep(0.01)

    async def caller(number: int) -> None:
        for turn in range(10):
            job = a_job(f"j{number}-{turn}", idempotency_key=f"k{number}-{turn}")
            (added,) = await surely(partial(store.add_jobs, [job]))
            assert not added.is_repeat
            await surely(partial(store.fail_waiting, job.id, error="{}", now=NOW))
            done.append(job.id)
            if len(done) % 40 == 0:
                await anyio.to_thread.run_sync(cut, limiter=one_at_a_time)

    with anyio.fail_after(120):
        async with anyio.create_task_group() as callers:
            for number in range(20):
                callers.start_soon(caller, number)

    assert len(cuts) >= 5
    stored = await surely(partial(store.jobs, JobFilter(scope=None, limit=500)))
    assert sorted(job.id for job in stored) == sorted(done)
    assert {job.status for job in stored} == {JobStatus.FAILED}
    for job in stored[::10]:
        assert [event.kind for event in await surely(partial(store.events, job.id))] == ["queued", "failed"]

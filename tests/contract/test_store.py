"""The store's contract (`control/store/base.py`), on SQLite and on a real PostgreSQL from its wheel."""

from __future__ import annotations

import anyio
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyfleet.control.jobs import JobFilter
from comfyfleet.control.records import AccountVariable, DecisionRow, Endpoint, LogRow, UsageRow, Workergroup, WorkerRow
from comfyfleet.control.store.base import NameTaken
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.wire.jobs import JobStatus
from support.stored_jobs import NOW, a_job, a_lease

pytestmark = pytest.mark.anyio


def an_endpoint(number: int, name: str = "comfy", **fields) -> Endpoint:
    return Endpoint(id=number, endpoint_name=name, created_at=NOW, **fields)


async def test_a_record_comes_back_as_it_was_put(store):
    endpoint = an_endpoint(1, inactivity_timeout=60.0)
    group = Workergroup(
        id=3, endpoint_id=1, endpoint_name="comfy", created_at=NOW, search_query={"gpu_ram": {"gte": 24}}
    )
    worker = WorkerRow(id=10, endpoint_id=1, workergroup_id=3, body='{"state": "idle"}')

    for record in (endpoint, group, worker, AccountVariable(name="HF_TOKEN", sealed="xx")):
        await store.put(record)

    assert await store.all(Endpoint) == [endpoint]
    assert await store.all(Workergroup) == [group]
    assert await store.all(WorkerRow) == [worker]
    await store.drop(Workergroup, 3)
    assert await store.all(Workergroup) == []


async def test_two_living_endpoints_never_share_a_name(store):
    await store.put(an_endpoint(1, "a name with spaces"))

    with pytest.raises(NameTaken):
        await store.put(an_endpoint(2, "a name with spaces"))

    await store.put(an_endpoint(1, "a name with spaces", deleted_at=NOW))
    await store.put(an_endpoint(2, "a name with spaces"))
    assert [endpoint.id for endpoint in await store.all(Endpoint)] == [1, 2]


async def test_one_callers_failure_does_not_touch_its_neighbours_in_the_group(store):
    await store.put(an_endpoint(1, "taken"))
    outcomes = {}

    async def put(number: int, name: str) -> None:
        try:
            await store.put(an_endpoint(number, name))
            outcomes[number] = "stored"
        except NameTaken:
            outcomes[number] = "refused"

    async with anyio.create_task_group() as callers:
        for number in range(2, 40):
            callers.start_soon(put, number, "taken" if number % 5 == 0 else f"free {number}")

    assert {number for number, outcome in outcomes.items() if outcome == "refused"} == set(range(5, 40, 5))
    assert len(await store.all(Endpoint)) == 1 + 38 - 7


async def test_a_counter_never_hands_out_a_number_twice(store):
    seen = []

    async def reserve() -> None:
        first = await store.reserve("request_idx", 10)
        seen.extend(range(first, first + 10))

    async with anyio.create_task_group() as callers:
        for _ in range(20):
            callers.start_soon(reserve)

    assert sorted(seen) == list(range(1, 201))


async def test_a_waiting_job_is_leased_once(store):
    await store.add_jobs([a_job()])
    taken = []

    async def take(number: int) -> None:
        job = await store.lease(a_lease(token=f"t{number}", worker_id=number))
        if job is not None:
            taken.append((number, job))

    async with anyio.create_task_group() as dispatchers:
        for number in range(10):
            dispatchers.start_soon(take, number)

    (number, job), *others = taken
    assert others == []
    assert (job.status, job.lease_token, job.worker_id, job.attempts) == (JobStatus.LEASED, f"t{number}", number, 1)
    assert [held.id for held in await store.leased()] == ["j1"]
    assert await store.head(1, "key:a", NOW) is None


async def test_only_the_tokens_holder_changes_a_leased_job(store):
    await store.add_jobs([a_job()])
    await store.lease(a_lease(token="old"))
    assert await store.take_over("j1", old_token="old", token="new", expires_at=NOW + 60)

    assert not await store.renew("j1", token="old", expires_at=NOW + 99)
    assert not await store.start("j1", token="old", now=NOW)
    assert not await store.finish("j1", token="old", status=JobStatus.COMPLETED, result="{}", error=None, now=NOW)
    assert not await store.requeue("j1", token="old", lost_worker=7, not_before=NOW, reason="lost", now=NOW)

    assert await store.start("j1", token="new", now=NOW + 1)
    assert await store.finish("j1", token="new", status=JobStatus.COMPLETED, result='{"x":1}', error=None, now=NOW + 2)
    assert not await store.finish("j1", token="new", status=JobStatus.FAILED, result=None, error=None, now=NOW + 3)
    job = await store.job("j1")
    assert (job.status, job.result, job.finished_at, job.started_at) == (
        JobStatus.COMPLETED,
        '{"x":1}',
        NOW + 2,
        NOW + 1,
    )


async def test_a_lost_workers_job_waits_again_and_remembers_who_lost_it(store):
    await store.add_jobs([a_job()])
    for attempt, worker in enumerate([7, 8, 7]):
        await store.lease(a_lease(token=f"t{attempt}", worker_id=worker))
        await store.start("j1", token=f"t{attempt}", now=NOW)
        assert await store.requeue(
            "j1", token=f"t{attempt}", lost_worker=worker, not_before=NOW + attempt, reason="worker lost", now=NOW
        )

    job = await store.job("j1")
    assert (job.status, job.attempts, job.lost_on, job.worker_id) == (JobStatus.QUEUED, 3, {7, 8}, None)
    assert (job.losses, job.started_at) == (3, None)
    assert await store.head(1, "key:a", NOW + 1) is None
    assert (await store.head(1, "key:a", NOW + 2)).id == "j1"


async def test_a_cancelled_job_that_is_given_back_waits_for_no_worker(store):
    await store.add_jobs([a_job()])
    await store.lease(a_lease())
    await store.cancel("j1", NOW + 1)

    given_back = await store.requeue("j1", token="t1", lost_worker=7, not_before=0.0, reason="lost", now=NOW + 2)

    job = await store.job("j1")
    assert given_back is job.status is JobStatus.CANCELLED
    assert (job.finished_at, job.lease_token) == (NOW + 2, None)
    assert await store.head(1, "key:a", NOW + 9) is None
    assert [event.kind for event in await store.events("j1")] == ["queued", "leased", "cancelled"]


async def test_higher_priority_goes_first_until_a_low_one_has_waited_long_enough(store):
    await store.add_jobs(
        [
            a_job("low, old", created_at=NOW - 1300),
            a_job("high, new", priority=2, created_at=NOW),
            a_job("low, new", created_at=NOW - 10),
        ]
    )
    order = []
    while (head := await store.head(1, "key:a", NOW)) is not None:
        order.append(head.id)
        await store.lease(a_lease(head.id, token=head.id))

    assert order == ["low, old", "high, new", "low, new"]
    assert await store.waiting() == []


async def test_what_waits_is_summed_per_endpoint_and_scope(store):
    await store.add_jobs([a_job(f"a{n}", created_at=NOW + n) for n in range(3)])
    await store.add_jobs([a_job("b", scope="key:b", cost=7.5)])
    await store.lease(a_lease("a0"))

    sums = {(waiting.scope): (waiting.jobs, waiting.cost, waiting.oldest_at) for waiting in await store.waiting()}

    assert sums == {"key:a": (2, 200.0, NOW + 1), "key:b": (1, 7.5, NOW)}
    assert await store.position(await store.job("a2")) == 1


async def test_cancel_ends_a_waiting_job_and_marks_a_running_one(store):
    await store.add_jobs([a_job("waits"), a_job("runs")])
    await store.lease(a_lease("runs"))

    waits, runs = await store.cancel("waits", NOW), await store.cancel("runs", NOW)

    assert (waits.status, waits.finished_at) == (JobStatus.CANCELLED, NOW)
    assert (runs.status, runs.cancel_requested) == (JobStatus.LEASED, 1)
    assert await store.cancel("nobody", NOW) is None


async def test_a_job_past_its_deadline_is_found_and_failed_only_while_it_waits(store):
    await store.add_jobs([a_job("late", deadline_at=NOW - 1), a_job("in time", deadline_at=NOW + 1)])

    assert await store.overdue(NOW) == ["late"]
    assert await store.fail_waiting("late", error='{"code":"deadline"}', now=NOW)
    assert not await store.fail_waiting("late", error="{}", now=NOW)
    assert (await store.job("late")).status is JobStatus.FAILED


async def test_events_are_numbered_and_replayed_from_any_place(store):
    await store.add_jobs([a_job()])
    await store.lease(a_lease())
    await store.start("j1", token="t1", now=NOW + 1)
    await store.add_event("j1", kind="progress", data='{"value":1}', now=NOW + 2)
    await store.finish("j1", token="t1", status=JobStatus.COMPLETED, result="{}", error=None, now=NOW + 3)

    events = await store.events("j1")

    assert [(event.seq, event.kind) for event in events] == [
        (1, "queued"),
        (2, "leased"),
        (3, "running"),
        (4, "progress"),
        (5, "completed"),
    ]
    assert await store.events("j1", after=3) == events[3:]


async def test_a_final_jobs_webhook_and_its_secrets_stay_until_the_receiver_was_told(store):
    await store.add_jobs([a_job("hook", webhook='{"url":"x"}', sealed="s"), a_job("none", sealed="s")])
    for name in ("hook", "none"):
        await store.lease(a_lease(name, token=name))
        await store.finish(name, token=name, status=JobStatus.COMPLETED, result="{}", error=None, now=NOW)

    assert await store.undelivered() == ["hook"]
    assert (await store.job("none")).sealed == ""
    assert await store.prune(NOW + 1) == 1
    assert await store.has_untold(1)
    await store.webhook_out("hook")
    assert await store.undelivered() == []
    assert (await store.job("hook")).sealed == "s"
    assert await store.prune(NOW + 1) == 0

    await store.webhooks_due_again(2)
    assert await store.undelivered() == []
    await store.webhooks_due_again(1)  # its outbox may be lost
    assert await store.undelivered() == ["hook"]

    await store.webhook_out("hook")
    await store.webhook_ended("hook")
    await store.webhooks_due_again(1)
    await store.webhook_out("hook")
    assert await store.undelivered() == []
    assert not await store.has_untold(1)
    assert (await store.job("hook")).sealed == ""
    assert await store.prune(NOW + 1) == 1


async def test_listings_page_without_gaps_or_repeats(store):
    await store.add_jobs([a_job(f"j{n:02}", created_at=NOW + n // 3) for n in range(20)])
    await store.add_jobs([a_job("other", scope="key:b")])
    seen, before = [], None
    while page := await store.jobs(JobFilter(scope="key:a", before=before, limit=6)):
        seen.extend(job.id for job in page)
        before = (page[-1].created_at, page[-1].id)

    assert seen == sorted((f"j{n:02}" for n in range(20)), reverse=True)
    assert len(await store.jobs(JobFilter(scope=None, limit=100))) == 21


async def test_decisions_logs_and_usage_come_back_in_order(store):
    for number in range(1, 6):
        await store.add_decision(
            DecisionRow(id=number, endpoint_id=1, at=NOW + number, sentence=f"s{number}", inputs="{}", outcome="{}")
        )
    lines = [LogRow(endpoint_id=1, workergroup_id=n % 2, at=NOW + n, level="info0", text=f"l{n}") for n in range(6)]
    await store.add_logs(lines)
    usage = {"endpoint_id": 1, "workergroup_id": 1, "worker_id": 1, "scope": "key:a", "kind": "gpu"}
    await store.add_usage([UsageRow(started_at=NOW + n, seconds=2.0, price=0.5, **usage) for n in range(4)])

    assert [row.id for row in await store.decisions(1, limit=2)] == [5, 4]
    assert [row.id for row in await store.decisions(1, limit=2, before_id=4)] == [3, 2]
    assert [line.text for line in await store.logs(endpoint_id=1, workergroup_id=None, tail=2)] == ["l4", "l5"]
    assert [line.text for line in await store.logs(endpoint_id=None, workergroup_id=1, tail=2)] == ["l3", "l5"]
    (sums,) = await store.usage(since=NOW + 1, until=NOW + 3)
    assert (sums.seconds, sums.price) == (4.0, 1.0)
    assert await store.usage(since=NOW, until=NOW + 9, scope="key:b") == []


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_everything_is_there_after_the_store_is_opened_again(store, tmp_path):
    await store.put(an_endpoint(1))
    await store.add_jobs([a_job()])
    await store.lease(a_lease())

    again = open_sqlite(tmp_path / "control.sqlite3")
    assert [job.lease_token for job in await again.leased()] == ["t1"]
    assert await again.reserve("x") == 1
    await again.close()


STEPS = st.lists(
    st.sampled_from(["lease", "start", "finish", "requeue", "cancel", "take_over", "stale_finish"]), max_size=14
)


@given(steps=STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_any_sequence_of_calls_finishes_a_job_at_most_once(store, steps):
    job_id = f"job-{await store.reserve('test')}"
    await store.add_jobs([a_job(job_id)])
    token, stale, finished = None, "nobody's", 0
    for number, step in enumerate(steps):
        if step == "lease" and await store.lease(a_lease(job_id, token=f"t{number}")) is not None:
            assert token is None
            token = f"t{number}"
        elif step == "start" and token:
            await store.start(job_id, token=token, now=NOW)
        elif step == "finish" and token:
            finished += await store.finish(
                job_id, token=token, status=JobStatus.COMPLETED, result="{}", error=None, now=NOW
            )
            stale, token = token, None
        elif step == "requeue" and token:
            await store.requeue(job_id, token=token, lost_worker=None, not_before=0.0, reason="x", now=NOW)
            stale, token = token, None
        elif step == "take_over" and token:
            await store.take_over(job_id, old_token=token, token=f"n{number}", expires_at=NOW)
            stale, token = token, f"n{number}"
        elif step == "stale_finish":
            assert not await store.finish(
                job_id, token=stale, status=JobStatus.COMPLETED, result="{}", error=None, now=NOW
            )
        elif step == "cancel":
            await store.cancel(job_id, NOW)
    job = await store.job(job_id)
    finals = [event for event in await store.events(job_id) if event.kind in ("completed", "failed", "cancelled")]
    assert finished <= 1
    assert len(finals) == (1 if job.is_final else 0)
    assert (job.lease_token is None) == (token is None)
    assert msgspec.json.decode(job.lost_workers) == []

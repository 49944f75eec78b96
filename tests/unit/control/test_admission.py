"""What is accepted as a durable job, over a whole control plane and a real store: all of a batch, or none of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from comfyfleet.control.admission import SEALED, JobSecrets, has_secret_url
from comfyfleet.control.records import UsageRow
from comfyfleet.wire.errors import IdempotencyMismatch, InvalidArguments, TooManyRequests, WorkflowRefused
from support.admission_world import AdmissionWorld, a_request

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(tmp_path, clock) -> AsyncIterator[AdmissionWorld]:
    async with AdmissionWorld(tmp_path, clock) as world:
        yield world


def a_use(at: float, seconds: float) -> UsageRow:
    return UsageRow(
        endpoint_id=1,
        workergroup_id=0,
        worker_id=1,
        scope="key:1",
        kind="job",
        started_at=at,
        seconds=seconds,
        price=0.0,
    )


async def test_a_batch_with_one_used_key_leaves_nothing_behind(world):
    (first,) = await world.submit(a_request(1, idempotency_key="k1"))

    batch = [a_request(2, idempotency_key="fresh1"), a_request(99, idempotency_key="k1"), a_request(3)]
    with pytest.raises(IdempotencyMismatch) as refused:
        await world.submit(*batch)

    assert refused.value.details["id"] == first.job.id
    assert [job.id for job in await world.stored()] == [first.job.id]
    (again,) = await world.submit(a_request(2, idempotency_key="fresh1"))
    assert not again.is_repeat


async def test_two_bodies_under_one_key_in_one_batch_are_refused_and_the_same_body_twice_is_one_job(world):
    with pytest.raises(IdempotencyMismatch):
        await world.submit(a_request(1, idempotency_key="k"), a_request(2, idempotency_key="k"))
    assert await world.stored() == []

    one, other = await world.submit(*[a_request(1, idempotency_key="k")] * 2)

    assert (one.job.id, other.is_repeat) == (other.job.id, True)


@pytest.mark.parametrize(
    "limits",
    [{"max_waiting_jobs": 1}, {"requests_per_s": 0.1, "burst": 1.0}, {"gpu_seconds_per_day": 10.0}],
    ids=lambda limits: next(iter(limits)),
)
async def test_whose_answer_was_lost_learns_its_jobs_id_although_the_limit_is_used_up(world, limits):
    body = a_request(1, idempotency_key="k")
    (first,) = await world.submit(body, **limits)
    (again,) = await world.submit(body, **limits)
    twice = await world.submit(body, body, **limits)

    assert (again.job.id, again.is_repeat) == (first.job.id, True)
    assert [one.job.id for one in twice] == [first.job.id] * 2
    for refused in (
        [a_request(1)],  # no key
        [a_request(1, idempotency_key="other")],
        [a_request(2, idempotency_key="k")],  # another body
        [body, a_request(2)],
    ):
        with pytest.raises(TooManyRequests):
            await world.submit(*refused, **limits)
    assert [job.id for job in await world.stored()] == [first.job.id]


@pytest.mark.parametrize(
    "terms", [{"priority": 5}, {"cost": 7.0}, {"deadline_s": 60.0}], ids=["priority", "cost", "deadline"]
)
async def test_other_terms_under_one_key_are_another_request(world, terms):
    (first,) = await world.submit(a_request(1, idempotency_key="k", **terms))

    with pytest.raises(IdempotencyMismatch):
        await world.submit(a_request(1, idempotency_key="k"))

    (again,) = await world.submit(a_request(1, idempotency_key="k", **terms))
    assert (again.job.id, again.is_repeat) == (first.job.id, True)


async def test_a_request_id_in_the_input_is_a_key_that_a_limit_respects(world):
    graph = a_request(1).input["workflow_json"]
    body = a_request(input={"workflow_json": graph, "request_id": "song-1"})
    (first,) = await world.submit(body, max_waiting_jobs=1)
    (again,) = await world.submit(body, max_waiting_jobs=1)

    assert (again.job.id, again.is_repeat) == (first.job.id, True)


@pytest.mark.parametrize("limits", [{"max_waiting_jobs": 5}, {"gpu_seconds_per_day": 500.0}], ids=["jobs", "seconds"])
async def test_jobs_that_wait_count_from_the_first_request_after_a_restart(world, limits):
    await world.submit(*[a_request(number) for number in range(5)], **limits)
    await world.restart()

    with pytest.raises(TooManyRequests):
        await world.submit(a_request(6), **limits)
    assert len(await world.stored()) == 5


async def test_a_days_gpu_seconds_count_after_a_restart_until_their_own_day_is_over(world):
    used = [a_use(world.clock.now() + 60.0, 30.0), a_use(world.clock.now() + 7200.0, 20.0)]
    await world.control.store.add_usage(used)
    world.clock.jump(20 * 3600.0)
    await world.restart()
    with pytest.raises(TooManyRequests) as refused:
        await world.submit(a_request(1), gpu_seconds_per_day=40.0)
    assert refused.value.retry_after_s == pytest.approx(4 * 3600.0, abs=3600.0)

    world.clock.jump(refused.value.retry_after_s)
    await world.restart()

    limits = world.control.durable.limits
    assert limits.quota_wait_s("key:1", 40.0, world.clock.now()) == 0
    assert limits.quota_wait_s("key:1", 20.0, world.clock.now()) > 0


async def test_a_batch_waits_and_is_listed_in_its_own_order(world):
    accepted = [one.job for one in await world.submit(*[a_request(number) for number in range(100)])]

    positions = [await world.control.store.position(job) for job in accepted]

    assert positions == list(range(100))
    assert [job.id for job in await world.stored()] == [job.id for job in reversed(accepted)]


SECRET = "planted-SECRET-7c1f"


@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{SECRET}@host/a.png",
        f"HTTPS://{SECRET}@host/a.png",
        f"s3://key:{SECRET}@host/a.png",
        f"https://host/a.png?X-Amz-Signature={SECRET}",
        f'https://us"er:{SECRET}@host/a.png',
        f"see http://plain/ and https://host/m.safetensors?token={SECRET}",
        f"https://user:{SECRET}@host/m.safetensors",
    ],
)
async def test_an_address_with_a_secret_is_in_no_file_of_the_database_and_comes_to_the_worker_whole(world, address):
    graph = a_request(1).input["workflow_json"]
    graph["3"] = {"class_type": "Fetches", "inputs": {"source": address}}

    (added,) = await world.submit(a_request(input={"workflow_json": graph}))

    files = list(world.folder.glob("control.sqlite3*"))
    assert any(added.job.id.encode() in file.read_bytes() for file in files)
    assert not any(SECRET.encode() in file.read_bytes() for file in files)
    opened = world.control.account.vault.open(added.job.sealed, SEALED)
    secrets = msgspec.json.decode(opened, type=JobSecrets)
    assert msgspec.json.decode(secrets.input)["workflow_json"] == graph


def test_what_has_no_address_or_a_plain_one_is_stored_as_it_is():
    assert not has_secret_url('{"a": "https://host/a.png", "text": "who @ what?", "b": "?"}')


def test_a_text_of_nothing_but_schemes_is_searched_in_one_go():
    assert not has_secret_url('{"a": "' + "://" * 1_000_000 + '"}')


@pytest.mark.parametrize("field", ["metadata", "input"])
async def test_what_is_nested_too_deep_is_refused_by_name_and_the_rest_can_be_written_into_something_larger(
    world, field
):
    refused = []
    for depth in range(700, 1050, 5):
        nested = {"a": nested_lists(depth)}
        graph = a_request(1).input["workflow_json"]
        given = {"metadata": nested} if field == "metadata" else {"input": {"workflow_json": graph, "extra": nested}}
        try:
            (added,) = await world.submit(a_request(**given))
        except InvalidArguments as refusal:
            refused.append((depth, refusal.details["field"]))
        else:
            kept = added.job.metadata if field == "metadata" else added.job.input
            assert msgspec.json.encode([[msgspec.json.decode(kept)]])

    assert {name for _, name in refused} == {field}
    assert 0 < len(refused) < 70


def nested_lists(depth: int) -> list:
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    return nested


async def test_a_bad_job_of_a_batch_is_named_by_its_place(world):
    with pytest.raises(InvalidArguments) as priority:
        await world.submit(a_request(1), a_request(2, priority=1000))
    with pytest.raises(WorkflowRefused) as workflow:
        await world.submit(a_request(1), a_request(2, input={"workflow_json": {"1": {"class_type": "X"}}}))

    assert priority.value.details["field"] == "jobs[1].priority"
    assert (workflow.value.details["field"], workflow.value.details["node_id"]) == ("jobs[1]", "1")
    assert await world.stored() == []

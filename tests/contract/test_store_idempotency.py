"""One job per key: what the store makes of an idempotency key it knows, on SQLite and on PostgreSQL."""

from __future__ import annotations

import anyio
import pytest

from comfyfleet.control.jobs import JobFilter
from comfyfleet.control.store.base import KeyTaken
from support.stored_jobs import a_job

pytestmark = pytest.mark.anyio


async def test_the_same_idempotency_key_stores_one_job_per_scope(store):
    first = await store.add_jobs([a_job("j1", idempotency_key="k")])
    again = await store.add_jobs([a_job("j2", idempotency_key="k"), a_job("j3")])
    elsewhere = await store.add_jobs([a_job("j4", idempotency_key="k", scope="key:b")])

    assert [added.is_repeat for added in first + again + elsewhere] == [False, True, False, False]
    assert again[0].job.id == "j1"
    assert await store.job("j2") is None


async def test_the_jobs_of_keys_are_found_within_a_scope(store):
    await store.add_jobs([a_job("j1", idempotency_key="k"), a_job("j2", idempotency_key="l"), a_job("j3")])
    await store.add_jobs([a_job("j4", idempotency_key="k", scope="key:b")])

    found = await store.known("key:a", ["l", "k", "m"])

    assert {key: job.id for key, job in found.items()} == {"k": "j1", "l": "j2"}
    assert (await store.known("key:b", ["k"]))["k"].id == "j4"
    assert await store.known("key:b", ["l"]) == {}


async def test_a_known_key_with_another_digest_stores_nothing_of_its_batch_and_all_of_the_others(store):
    await store.add_jobs([a_job("first", idempotency_key="k")])
    outcomes = {}

    async def submit(number: int) -> None:
        jobs = [a_job(f"{number} a", idempotency_key=f"fresh {number}"), a_job(f"{number} b")]
        if number % 4 == 0:
            jobs.insert(1, a_job(f"{number} taken", idempotency_key="k", digest="other"))
        try:
            outcomes[number] = [added.is_repeat for added in await store.add_jobs(jobs)]
        except KeyTaken as taken:
            outcomes[number] = taken.job_id

    async with anyio.create_task_group() as callers:
        for number in range(20):
            callers.start_soon(submit, number)

    assert outcomes == {number: [False, False] if number % 4 else "first" for number in range(20)}
    stored = {job.id for job in await store.jobs(JobFilter(scope=None, limit=500))}
    assert stored == {"first"} | {f"{number} {name}" for number in range(20) if number % 4 for name in "ab"}
    assert (await store.add_jobs([a_job("later", idempotency_key="fresh 0")]))[0].is_repeat is False


async def test_a_job_stored_before_terms_were_in_its_digest_has_its_repeats_still(store):
    await store.add_jobs([a_job("old", idempotency_key="k", digest="body")])
    await store.add_jobs([a_job("new", idempotency_key="l", digest="body.terms")])

    (again,) = await store.add_jobs([a_job("j1", idempotency_key="k", digest="body.terms")])

    assert (again.job.id, again.is_repeat) == ("old", True)
    for key, digest in (("k", "other.terms"), ("l", "body.other"), ("l", "body")):
        with pytest.raises(KeyTaken):
            await store.add_jobs([a_job("j2", idempotency_key=key, digest=digest)])


async def test_two_digests_under_one_key_in_one_batch_store_nothing(store):
    with pytest.raises(KeyTaken):
        await store.add_jobs([a_job("j1", idempotency_key="k"), a_job("j2", idempotency_key="k", digest="other")])

    assert await store.jobs(JobFilter(scope=None)) == []

"""The loop that leases durable jobs, over a real store and a real desk: nothing falls between two looks."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest

from comfyfleet.control.backlog import Backlog
from comfyfleet.control.dispatcher import Dispatcher
from comfyfleet.control.held_leases import HeldLeases
from comfyfleet.control.job_feed import JobFeed, Kick
from comfyfleet.control.keys import Vault
from comfyfleet.control.ownership import SoleOwner
from comfyfleet.control.records import Endpoint
from comfyfleet.control.store.store import SqlStore
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.ids import SeededIds
from comfyfleet.wire.jobs import JobStatus
from support.http_worker import HttpWorker
from support.routing_world import RoutingWorld
from support.stored_jobs import a_job, a_lease

pytestmark = pytest.mark.anyio


class CancelledAt:
    """A store in which the caller cancels the job right after one kind of call, as another task may."""

    def __init__(self, store: SqlStore, feed: JobFeed, call: str) -> None:
        self._store, self._feed, self._call = store, feed, call

    def __getattr__(self, name):
        method = getattr(self._store, name)
        if name != self._call:
            return method

        async def called(*given, **named):
            found = await method(*given, **named)
            if found:
                await self._store.cancel("j1", 1.0)
                self._feed.cancel("j1")
            return found

        return called


@asynccontextmanager
async def a_dispatcher(tmp_path, worker: HttpWorker, call: str):
    """A ready worker 1 that takes jobs and says nothing more about them."""
    worker.answers["/generate"] = (202, {"id": "j1", "status": "queued"}, {})
    worker.answers["/cancel/j1"] = (200, {}, {})
    worker.held.add("/result/j1")
    async with RoutingWorld(tmp_path, min_load=1, cold_workers=1, max_workers=1) as world:
        await world.tick()
        (worker_id,) = world.worker_ids()
        await world.tick()
        world.report(worker_id, url=worker.url)
        await world.tick()
        feed, backlog, kick = JobFeed(), Backlog(), Kick()
        store = CancelledAt(world.store, feed, call)
        leases = HeldLeases(
            store=store,
            catalog=world.catalog,
            desk=world.plane.desk,
            workers=world.plane.workers,
            tickets=world.plane.tickets,
            calls=worker.calls,
            feed=feed,
            backlog=backlog,
            vault=Vault(b"m" * 64),
            clock=world.clock,
            ids=SeededIds(2),
            ended=lambda _outcome: None,
            kick=kick,
            ownership=SoleOwner(),
        )
        yield (
            Dispatcher(
                store=store,
                catalog=world.catalog,
                desk=world.plane.desk,
                backlog=backlog,
                leases=leases,
                clock=world.clock,
                kick=kick,
                ownership=SoleOwner(),
            ),
            world,
        )


@pytest.mark.parametrize("call", ["head", "lease"])
async def test_a_cancel_that_comes_while_the_job_is_leased_is_heard(tmp_path, call):
    async with HttpWorker() as worker, a_dispatcher(tmp_path, worker, call) as (dispatcher, world):
        await world.store.add_jobs([a_job()])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            with anyio.fail_after(60):
                if call == "lease":
                    await worker.asked("/cancel/j1")
                while (await world.store.job("j1")).status is JobStatus.QUEUED:  # noqa: ASYNC110 - nothing tells
                    await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        job = await world.store.job("j1")

    assert job.cancel_requested or job.status is JobStatus.CANCELLED
    assert ("/generate" in [path for path, _ in worker.heard]) == (call == "lease")


async def test_a_cancel_that_came_after_the_leases_were_listed_is_heard_by_who_takes_them_over(tmp_path):
    async with HttpWorker() as worker, a_dispatcher(tmp_path, worker, "leased") as (dispatcher, world):
        await world.store.add_jobs([a_job()])
        lease = msgspec.structs.replace(a_lease(), worker_id=world.worker_ids()[0], worker_url=worker.url)
        await world.store.lease(lease)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            with anyio.fail_after(60):
                await worker.asked("/cancel/j1")
            tasks.cancel_scope.cancel()


async def test_what_goes_wrong_at_one_endpoint_holds_up_no_other(tmp_path):
    async with HttpWorker() as worker, a_dispatcher(tmp_path, worker, "") as (dispatcher, world):
        world.catalog.put_endpoint(Endpoint(id=2, endpoint_name="broken", created_at=0.0))
        await world.store.add_jobs([a_job(), a_job("j2", endpoint_id=2)])
        head, broke = world.store.head, anyio.Event()

        async def broken_head(endpoint_id, scope, now):
            if endpoint_id == 2:
                broke.set()
                raise RuntimeError("broken")
            await broke.wait()
            return await head(endpoint_id, scope, now)

        world.store.head = broken_head
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            with anyio.fail_after(60):
                await worker.asked("/generate")
            tasks.cancel_scope.cancel()
        assert (await world.store.job("j2")).status is JobStatus.QUEUED


@pytest.mark.parametrize("other", [WorkerState.LOADING, WorkerState.ERROR])
async def test_a_worker_that_lost_a_job_has_it_again_only_where_no_other_comes_and_others_jobs_at_once(tmp_path, other):
    async with HttpWorker() as worker, a_dispatcher(tmp_path, worker, "") as (dispatcher, world):
        (worker_id,) = world.worker_ids()
        coming = Worker(id=99, endpoint_id=1, group_id=1, mtoken="m", created_at=0.0, state=other)
        world.plane.workers.add(coming, world.clock.now())
        await world.store.add_jobs([a_job(lost_workers=f"[{worker_id}]"), a_job("j2", scope="key:b")])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            with anyio.fail_after(60):
                await worker.asked("/generate")
            leased = [job.id for job in await world.store.leased()]
            tasks.cancel_scope.cancel()

    assert leased == ["j2" if other is WorkerState.LOADING else "j1"]


def test_a_run_that_ended_takes_nothing_from_the_jobs_next_run():
    feed = JobFeed()
    first = feed.cancel_event("j1")
    second = feed.cancel_event("j1")

    feed.done("j1", first)
    feed.cancel("j1")

    assert second.is_set()
    assert not first.is_set()

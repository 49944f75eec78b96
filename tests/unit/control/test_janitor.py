"""What the janitor ends: whoever counts what waits knows it at once."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.backlog import Backlog
from comfyfleet.control.janitor import Janitor
from comfyfleet.control.job_feed import JobFeed, Kick
from comfyfleet.control.ownership import SoleOwner
from comfyfleet.wire.jobs import JobStatus
from support.routing_world import RoutingWorld
from support.stored_jobs import a_job

pytestmark = pytest.mark.anyio


async def test_a_deadline_that_passes_in_the_queue_makes_room_for_its_keys_next_job_at_once(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0) as world:
        backlog = Backlog()
        for job in (a_job(deadline_at=world.clock.now() + 5.0), a_job("j2")):
            await world.store.add_jobs([job])
            backlog.add(job.endpoint_id, job.scope, job.cost, job.created_at)
        janitor = a_janitor(world, backlog)
        await janitor.step()
        assert backlog.of_scope("key:a") == 2
        world.clock.jump(6.0)

        await janitor.step()
        await janitor.step()
        job = await world.store.job("j1")

    assert (job.status, msgspec.json.decode(job.error)["code"]) == (JobStatus.FAILED, "deadline_exceeded")
    assert backlog.of_scope("key:a") == 1


def a_janitor(world: RoutingWorld, backlog: Backlog) -> Janitor:
    return Janitor(
        store=world.store,
        catalog=world.catalog,
        workers=world.plane.workers,
        feed=JobFeed(),
        backlog=backlog,
        clock=world.clock,
        ended=Kick(),
        keep_s=3600.0,
        ownership=SoleOwner(),
    )

"""A fleet over time, on a fake clock: crash loops, missing capacity, rolling updates, deletion, lost workers."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from comfyfleet.control.fleet.base import Presence, WorkerSpec
from comfyfleet.control.placements import Placed
from support.routing_world import RoutingWorld

pytestmark = pytest.mark.anyio


async def test_workers_that_keep_crashing_are_called_a_crash_loop_and_started_less_and_less(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0, max_workers=1) as world:
        waits = world.ask(replay_timeout=3600.0)
        starts = []
        for second in range(400):
            await world.tick()
            for worker in await world.fleet.list():
                if worker.presence is Presence.RUNNING:
                    starts.append(second)
                    world.fleet.exit(worker.id)
        reason = world.ask(waits.answer.request_idx).answer.reason

        assert "crash loop" in reason
        assert "exited with code 1" in reason
        assert "capacity" not in reason
        assert len(starts) < 15, "each start after a row of failures waits longer"


async def test_a_machine_without_room_is_called_capacity(tmp_path):
    async with RoutingWorld(tmp_path, slots=0, cold_workers=0, max_workers=1) as world:
        waits = world.ask()
        await world.tick()
        await world.tick()

        reason = world.ask(waits.answer.request_idx).answer.reason
        assert "no capacity" in reason
        assert world.worker_ids() == [], "nothing is left behind of what could not be made"


async def test_a_rolling_update_restarts_every_worker_and_never_all_at_once(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=2, max_workers=2, min_load=1.7) as world:
        for _ in range(4):
            await world.tick()
            for worker_id in world.worker_ids():
                if world.plane.workers.get(worker_id).state != "idle":
                    world.report(worker_id)
        assert world.states() == ["idle", "idle"]
        world.catalog.put_workergroup(msgspec.structs.replace(world.group, update_generation=1, is_updating=True))

        fewest = 2
        for _ in range(12):
            await world.tick()
            fewest = min(fewest, world.states().count("idle"))
            for worker_id in world.worker_ids():
                if world.plane.workers.get(worker_id).state == "update_rebooting":
                    world.report(worker_id)

        restarted = [worker_id for verb, worker_id in world.fleet.calls if verb == "start"]
        assert sorted(restarted) == [1, 2]
        assert fewest == 1
        assert {worker.generation for worker in world.plane.workers.all()} == {1}


async def test_an_update_that_is_called_off_leaves_the_rest_as_they_are_and_drains_nobody(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1, min_load=0.1) as world:
        await world.tick()
        world.report(1)
        busy = world.ask()
        assert isinstance(busy, Placed)
        world.report(1, working=(busy.answer.request_idx,))
        world.catalog.put_workergroup(msgspec.structs.replace(world.group, update_generation=1, is_updating=True))
        await world.tick()
        draining = world.plane.workers.get(1).intent

        world.catalog.put_workergroup(msgspec.structs.replace(world.group, update_generation=1, is_updating=False))
        await world.tick()
        kept = world.plane.workers.get(1).intent
        world.finish(1, busy.answer.request_idx)
        world.report(1)
        await world.tick()

        assert (draining, kept) == ("update", "")
        assert [verb for verb, _ in world.fleet.calls if verb == "start"] == []
        assert isinstance(world.ask(), Placed)


async def test_a_worker_with_an_open_session_is_not_updated_even_if_the_session_costs_nothing(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1, min_load=0.1) as world:
        await world.tick()
        world.report(1, num_requests_working=1)
        world.catalog.put_workergroup(msgspec.structs.replace(world.group, update_generation=1, is_updating=True))
        for _ in range(3):
            await world.tick()
            world.report(1, num_requests_working=1)
        during = [verb for verb, _ in world.fleet.calls]
        world.report(1)
        for _ in range(2):
            await world.tick()

        assert "start" not in during
        assert [verb for verb, _ in world.fleet.calls].count("start") == 1


async def test_deleting_an_endpoint_lets_running_work_end_first(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1) as world:
        await world.tick()
        world.report(1)
        placed = world.ask()
        assert isinstance(placed, Placed)
        world.report(1, working=(placed.answer.request_idx,))
        world.change_endpoint(msgspec.structs.replace(world.endpoint, deleted_at=world.clock.now()))
        for _ in range(5):
            await world.tick()
            world.report(1, working=(placed.answer.request_idx,))
        during = world.worker_ids()
        world.finish(1, placed.answer.request_idx)
        world.report(1)
        for _ in range(2):
            await world.tick()

        assert during == [1]
        assert world.worker_ids() == []
        assert ("destroy", 1) in world.fleet.calls


async def test_a_worker_whose_restart_takes_long_is_seen_stopped_meanwhile_and_that_is_no_failure(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1, min_load=0.5) as world:
        await world.tick()
        world.report(1)
        world.fleet.lose(1)
        world.fleet.starting = anyio.Event()
        await world.run(20)
        meanwhile = (world.states(), world.plane.workers.get(1).failures, world.plane.workers.get(1).incarnation)

        world.fleet.starting.set()
        await world.run(5)
        started = world.fleet.specs[1].incarnation
        world.report(1, incarnation=started)

        assert meanwhile[:2] == (["rebooting"], 0)
        assert started == meanwhile[2], "the life that was started is the one that is listened to"
        assert world.states() == ["idle"]


async def test_a_process_that_dies_takes_its_worker_out_at_once_and_it_is_restarted(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1, min_load=0.5) as world:
        await world.tick()
        world.report(1)
        placed = world.ask()
        world.fleet.exit(1, code=-9)
        await world.tick()
        failed = world.states()
        await world.run(6)
        restarted = world.states()
        world.report(1)
        again = world.ask(placed.answer.request_idx)
        while not isinstance(again, Placed):
            await world.tick()
            again = world.ask(placed.answer.request_idx)

        assert failed == ["error"]
        assert restarted == ["rebooting"]
        assert isinstance(again, Placed)


async def test_a_worker_that_no_record_knows_is_ended(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0) as world:
        spec = WorkerSpec(id=99, mtoken="x", incarnation="i")
        await world.fleet.create(spec)
        await world.tick()
        young = [worker.id for worker in await world.fleet.list()]
        await world.run(8)

        assert young == [99], "it may be one whose record is just being written"
        assert await world.fleet.list() == []

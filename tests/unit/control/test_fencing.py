"""A worker that was started again elsewhere: its former life is refused, and no fault is laid at its door."""

from __future__ import annotations

import pytest

from comfyfleet.control.search import parse_search
from comfyfleet.wire.errors import Fenced
from comfyfleet.wire.workers import FinishedRequests
from support.routing_world import RoutingWorld

pytestmark = pytest.mark.anyio


async def test_reports_of_a_former_life_are_refused_and_change_nothing(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1) as world:
        await world.tick()
        (number,) = world.worker_ids()
        former = world.fleet.specs[number].incarnation
        world.report(number, incarnation=former)
        assert world.states() == ["idle"]

        world.fleet.lose(number)
        await world.tick()
        await world.tick()
        present = world.fleet.specs[number].incarnation
        before = world.plane.workers.get(number)

        assert present != former
        assert world.states() == ["rebooting"], "no fault of its own: started again without a pause"
        assert before.failures == 0
        with pytest.raises(Fenced):
            world.report(number, incarnation=former)
        with pytest.raises(Fenced):
            world.plane.reports.finished(
                FinishedRequests(worker_id=number, mtoken=before.mtoken, request_idxs=(1,), incarnation=former)
            )
        assert world.plane.workers.get(number) == before
        world.report(number, incarnation=present)
        assert world.states() == ["idle"]


async def test_a_control_plane_killed_at_a_restart_knows_the_life_it_had_begun(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1) as world:
        await world.tick()
        (number,) = world.worker_ids()
        world.report(number)
        world.fleet.lose(number)
        await world.tick()
        await world.tick()

        await world.restart()

        assert world.plane.workers.get(number).incarnation == world.fleet.specs[number].incarnation


async def test_what_a_group_searches_for_reaches_its_workers(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1) as world:
        text = "gpu_ram>=24 num_gpus=2 gpu_name=RTX_4090"
        world.search(text)
        await world.tick()
        (number,) = world.worker_ids()
        spec = world.fleet.specs[number]

        assert (spec.search, spec.gpu_ram_gb, spec.num_gpus) == (parse_search(text), 24, 2)
        assert spec.search_params == text

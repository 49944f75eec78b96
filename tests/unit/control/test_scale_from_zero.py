"""From nothing to an answer: a request waits, a worker is made, reports, and gets it."""

from __future__ import annotations

import pytest

from comfyfleet.control.placements import Placed, Waits
from support.routing_world import RoutingWorld

pytestmark = pytest.mark.anyio


async def test_a_request_that_finds_no_worker_has_one_created_and_gets_it(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0, max_workers=2) as world:
        await world.tick()
        assert world.worker_ids() == []

        waits = world.ask()
        await world.tick()
        (worker_id,) = world.worker_ids()
        again = world.ask(waits.answer.request_idx)
        world.report(worker_id)
        placed = world.ask(waits.answer.request_idx)

        assert isinstance(waits, Waits)
        assert isinstance(again, Waits)
        assert "worker" in again.answer.reason
        assert isinstance(placed, Placed)
        assert placed.answer.url == "http://127.0.0.1:3010"
        assert placed.answer.request_idx == waits.answer.request_idx


async def test_an_idle_worker_goes_back_to_sleep_and_is_woken_instead_of_a_new_one_created(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0, max_workers=2) as world:
        first = world.ask()
        await world.tick()
        world.report(1)
        world.ask(first.answer.request_idx)
        world.finish(1, first.answer.request_idx)
        await world.run(420)
        assert world.states() == ["stopped"]

        second = world.ask()
        await world.tick()
        assert world.states() == ["starting"]
        world.report(1)

        assert isinstance(world.ask(second.answer.request_idx), Placed)
        assert world.worker_ids() == [1]

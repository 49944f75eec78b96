"""Callers that come back, again and again: each gets what is best for its request, and costs nobody else anything."""

from __future__ import annotations

import pytest

from comfyfleet.control.placements import Placed, TakeRequest, Waits
from comfyfleet.control.records import Endpoint
from support.routing_world import RoutingWorld

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(tmp_path):
    """Two workers with room for many, brought by hand; `anywhere` is the endpoint with id 2."""
    async with RoutingWorld(tmp_path, cold_workers=0) as world:
        world.catalog.put_endpoint(Endpoint(id=2, endpoint_name="anywhere", created_at=0.0, cold_workers=0))
        for _ in range(2):
            await world.plane.lifecycle.register(1, 0)
        report(world)
        yield world


def report(world: RoutingWorld, **of_first) -> None:
    for worker_id in (1, 2):
        world.report(worker_id, score=10.0, **(of_first if worker_id == 1 else {}))


def come_back(world: RoutingWorld, request_idx: int) -> Placed:
    """A caller returns and waits out the throttle."""
    for _ in range(100):
        answer = world.ask(request_idx)
        if isinstance(answer, Placed):
            return answer
        world.clock.jump(0.1)
    raise AssertionError("no worker in ten seconds")


async def test_a_request_whose_public_worker_answers_503_reaches_the_other_one(world):
    """The public framework calls every answer of its model a success, and replays none."""
    placed = world.ask()
    request_idx, seen = placed.answer.request_idx, [placed.worker_id]
    world.report(placed.worker_id, score=10.0, working=(request_idx,))
    world.clock.jump(1.0)
    world.finish(placed.worker_id, request_idx, "Success")
    report(world)
    world.clock.jump(2.5)

    seen.append(come_back(world, request_idx).worker_id)

    assert sorted(seen) == [1, 2]


async def test_a_caller_whose_limit_is_shorter_than_its_job_joins_it_however_often_it_comes_back(world):
    placed = world.ask()
    request_idx, seen = placed.answer.request_idx, {placed.worker_id}
    for _ in range(4):
        for _ in range(3):
            world.clock.jump(1.0)
            for worker_id in (1, 2):
                listed = (request_idx,) if worker_id == placed.worker_id else ()
                world.report(worker_id, score=10.0, working=listed)
        seen.add(come_back(world, request_idx).worker_id)

    assert seen == {placed.worker_id}


async def test_one_caller_who_reaches_nobody_takes_no_worker_from_the_others(world):
    walled = world.ask().answer.request_idx
    served = []
    for step in range(3000):  # five minutes
        world.clock.jump(0.1)
        world.ask(walled)
        if step % 10 == 0:
            report(world)
        if step % 200 == 199:
            good = world.ask(scope="key:good")
            served.append(isinstance(good, Placed))
            if isinstance(good, Placed):
                world.clock.jump(1.0)
                world.finish(good.worker_id, good.answer.request_idx)

    assert all(served)
    assert [world.plane.workers.get(worker_id).quarantines for worker_id in (1, 2)] == [0, 0]


@pytest.mark.parametrize(("is_reached", "quarantines"), [(False, 1), (True, 0)])
async def test_two_requests_that_reach_nobody_put_a_worker_away_unless_another_one_arrived(
    world, is_reached, quarantines
):
    first, second = [one for one in (world.ask() for _ in range(4)) if one.worker_id == 1]
    world.ask(first.answer.request_idx)
    report(world)  # it is alive, it says
    arrived = next(one for one in (world.ask(scope="key:good") for _ in range(4)) if one.worker_id == 1)
    report(world, working=(arrived.answer.request_idx,) if is_reached else ())

    world.ask(second.answer.request_idx)

    assert world.plane.workers.get(1).quarantines == quarantines


async def test_nobody_waits_behind_a_request_that_the_only_free_worker_has_just_failed(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0) as world:
        for _ in range(2):
            worker = await world.plane.lifecycle.register(1, 0)
            world.report(worker.id, score=1.0)  # full with one request
        failed, runs = world.ask(), world.ask()
        world.report(runs.worker_id, score=1.0, working=(runs.answer.request_idx,))
        world.finish(failed.worker_id, failed.answer.request_idx, "Error")
        world.report(failed.worker_id, score=1.0)

        back = world.ask(failed.answer.request_idx)
        other = world.ask(scope="key:good")

        assert isinstance(back, Waits)
        assert isinstance(other, Placed)


async def test_a_number_that_nobody_was_given_is_not_taken(world):
    given = world.ask().answer.request_idx
    guessed = world.ask(given + 2, scope="key:b")
    fresh = [world.ask(scope="key:a").answer.request_idx for _ in range(5)]

    assert guessed.answer.request_idx not in {given + 2, *fresh}


async def test_a_number_of_another_endpoint_opens_no_door_there(world):
    report(world, working=(4711,))  # as after a restart: a worker lists what nobody here remembers
    asked = TakeRequest(endpoint_id=2, endpoint_name="anywhere", request_idx=4711, scope="key:b", max_queue_time=30.0)

    assert isinstance(world.plane.desk.take(asked), Waits)
    assert world.ask(4711).worker_id == 1, "whose it is finds it"

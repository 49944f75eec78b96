"""What a workflow really costs, learned from finished jobs: it corrects a client's guess, and survives a restart."""

from __future__ import annotations

import pytest

from comfyfleet.control.learned_cost import ENOUGH, KEPT_SHAPES, LearnedCost
from comfyfleet.control.placements import Placed
from comfyfleet.wire.workers import FinishedRequest, FinishedRequests
from support.routing_world import RoutingWorld

pytestmark = pytest.mark.anyio

FILM, WAN = "f" * 16, frozenset({"wan.safetensors"})


def finish(world: RoutingWorld, worker_id: int, request_idx: int, *, seconds: float, **facts) -> None:
    """A worker of ours says how long its engine took, and for which shape."""
    now = world.clock.now()
    entry = FinishedRequest(
        request_idx=request_idx,
        status="Success",
        work_started_at=now - seconds,
        work_completed_at=now,
        seconds=seconds,
        **{"shape": FILM, **facts},
    )
    worker = world.plane.workers.get(worker_id)
    world.plane.reports.finished(FinishedRequests(worker_id=worker_id, mtoken=worker.mtoken, requests=(entry,)))


async def a_film(world: RoutingWorld, *, seconds: float, **facts) -> None:
    placed = world.ask(models=facts.pop("models", frozenset()))
    assert isinstance(placed, Placed)
    world.report(placed.worker_id, score=2.0, working=(placed.answer.request_idx,))
    finish(world, placed.worker_id, placed.answer.request_idx, seconds=seconds, **facts)


async def a_world(tmp_path) -> RoutingWorld:
    world = RoutingWorld(tmp_path, cold_workers=0)
    await world.__aenter__()
    worker = await world.plane.lifecycle.register(1, 0)
    world.report(worker.id, score=2.0)
    return world


async def test_a_few_jobs_teach_what_their_shape_costs_whatever_the_caller_guessed(tmp_path):
    world = await a_world(tmp_path)
    for _ in range(ENOUGH):
        assert world.plane.learned.cost(1, FILM) is None
        await a_film(world, seconds=140.0)

    assert world.plane.learned.cost(1, FILM) == pytest.approx(280.0), "140 s on a worker of score 2"
    assert world.plane.learned.seconds(1, FILM, 0.5) == pytest.approx(560.0), "and on one of score 0.5"
    await world.__aexit__(None, None, None)


async def test_what_was_learned_is_known_after_a_restart(tmp_path):
    world = await a_world(tmp_path)
    for _ in range(ENOUGH):
        await a_film(world, seconds=10.0)
    await world.plane.save_learned()
    await world.restart()

    assert world.plane.learned.cost(1, FILM) == pytest.approx(20.0)
    await world.__aexit__(None, None, None)


async def test_a_job_that_had_to_load_its_models_teaches_what_loading_costs_and_not_what_the_job_costs(tmp_path):
    world = await a_world(tmp_path)
    for _ in range(ENOUGH):
        await a_film(world, seconds=10.0)
    await a_film(world, seconds=14.0, loaded=True)
    world.report(1, score=2.0, warm_models=("wan.safetensors",))

    assert world.plane.learned.cost(1, FILM) == pytest.approx(20.0)
    assert world.plane.workers.load(1).swap_s == pytest.approx(4.0)
    await world.__aexit__(None, None, None)


async def test_an_answer_from_the_engines_cache_teaches_nothing(tmp_path):
    world = await a_world(tmp_path)
    for _ in range(2 * ENOUGH):
        await a_film(world, seconds=0.0)

    assert world.plane.learned.cost(1, FILM) is None
    await world.__aexit__(None, None, None)


async def test_a_worker_that_has_the_models_is_preferred_for_as_long_as_loading_them_would_take(tmp_path):
    world = await a_world(tmp_path)
    other = await world.plane.lifecycle.register(1, 0)
    world.report(1, score=2.0, warm_models=())
    world.report(other.id, score=2.0, warm_models=("wan.safetensors",))

    chosen = [world.ask(models=WAN, cost=12.0).worker_id for _ in range(5)]

    assert chosen == [2, 2, 2, 1, 2], "15 s of loading against 6 s a job, until that queue is longer"
    await world.__aexit__(None, None, None)


def test_one_stalled_job_does_not_move_the_estimate_and_old_shapes_make_room():
    learned = LearnedCost()
    for seconds in (10.0, 11.0, 9.0, 500.0, 10.0):
        learned.learn(1, "kept", seconds=seconds, score=1.0)
    assert learned.cost(1, "kept") == 10.0
    learned.take_changes()
    for number in range(KEPT_SHAPES):
        learned.learn(1, f"{number}", seconds=1.0, score=1.0)

    changed, forgotten = learned.take_changes()

    assert learned.cost(1, "kept") is None
    assert forgotten == ["1:kept"]
    assert len(changed) == KEPT_SHAPES

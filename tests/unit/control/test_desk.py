"""Requests at the desk: order, returns, quarantine, reports. Statements 14, 18, 29, 30, 33 and 34 to the second."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyfleet.control.load import Booking, WorkerLoad
from comfyfleet.control.placements import Placed, Waits
from comfyfleet.control.router import Refusal, Want, choose
from comfyfleet.control.scaling import replay
from comfyfleet.control.worker_states import WORKER_TRANSITIONS, WorkerState, after_report, apply
from comfyfleet.wire.errors import Unauthorized
from comfyfleet.wire.jobs import IllegalTransition
from comfyfleet.wire.workers import WorkerStatusReport
from support.routing_world import RoutingWorld

pytestmark = pytest.mark.anyio


async def a_world_with(tmp_path, *scores: float, **endpoint) -> RoutingWorld:
    """Workers of those scores, ready, brought by hand."""
    world = RoutingWorld(tmp_path, cold_workers=0, **endpoint)
    await world.__aenter__()
    for score in scores:
        worker = await world.plane.lifecycle.register(1, 0)
        world.report(worker.id, score=score)
    return world


async def close(world: RoutingWorld) -> None:
    await world.__aexit__(None, None, None)


def come_back(world: RoutingWorld, request_idx: int):
    """A caller returns and waits out the throttle."""
    answer = world.ask(request_idx)
    while not isinstance(answer, Placed):
        world.clock.jump(0.05)
        answer = world.ask(request_idx)
    return answer


async def test_the_line_is_first_in_first_out_whoever_polls_first(tmp_path):
    world = await a_world_with(tmp_path)
    waiting = [world.ask() for _ in range(3)]
    worker = await world.plane.lifecycle.register(1, 0)
    world.report(worker.id, score=1.0)  # full with one job of 100

    answers = [world.ask(waits.answer.request_idx) for waits in reversed(waiting)]

    assert [type(answer) for answer in answers] == [Waits, Waits, Placed]
    await close(world)


async def test_a_place_that_its_caller_does_not_come_for_goes_to_the_next(tmp_path):
    world = await a_world_with(tmp_path)
    first, second = world.ask(), world.ask()
    worker = await world.plane.lifecycle.register(1, 0)
    world.report(worker.id, score=1.0)
    kept = world.ask(second.answer.request_idx)
    for _ in range(8):
        await world.tick()
        kept = world.ask(second.answer.request_idx)
    back = world.ask(first.answer.request_idx)

    assert isinstance(kept, Placed)
    assert isinstance(back, Waits), "it keeps its place in the line, and waits for the next room"
    await close(world)


async def test_a_waiting_request_without_polls_is_forgotten_after_its_replay_timeout(tmp_path):
    world = await a_world_with(tmp_path)
    world.ask(replay_timeout=5.0)
    kept = world.ask(replay_timeout=60.0)
    for _ in range(6):
        await world.tick()

    demand = world.plane.desk.demand(1)

    assert (demand.waiting, demand.waiting_cost) == (1, 100.0)
    assert world.plane.desk.queue.get(kept.answer.request_idx) is not None
    await close(world)


async def test_another_keys_number_is_a_new_request(tmp_path):
    world = await a_world_with(tmp_path)
    mine = world.ask(scope="key:mine")

    theirs = world.ask(mine.answer.request_idx, scope="key:theirs")

    assert theirs.answer.request_idx != mine.answer.request_idx
    await close(world)


async def test_numbers_and_places_survive_a_restart_of_the_control_plane(tmp_path):
    world = await a_world_with(tmp_path)
    before = world.ask()
    await world.restart()

    fresh = world.ask()
    back = world.ask(before.answer.request_idx)
    worker = await world.plane.lifecycle.register(1, 0)
    world.report(worker.id, score=1.0)

    assert fresh.answer.request_idx > before.answer.request_idx
    assert back.answer.request_idx == before.answer.request_idx
    assert isinstance(world.ask(before.answer.request_idx), Placed), "it was there first"
    await close(world)


async def test_a_returning_request_joins_the_worker_that_lists_it_and_leaves_it_when_it_bounces(tmp_path):
    world = await a_world_with(tmp_path, 100.0, 50.0)
    first = world.ask()
    assert first.worker_id == 1
    world.report(1, score=100.0, working=(first.answer.request_idx,))

    joined = come_back(world, first.answer.request_idx)
    elsewhere = come_back(world, first.answer.request_idx)
    others = [world.ask() for _ in range(2)]

    assert joined.worker_id == 1
    assert joined.answer.reqnum != first.answer.reqnum
    assert elsewhere.worker_id == 2
    assert {placed.worker_id for placed in others} == {2}, "cut off in mid-job and gone: quarantined for all"
    await close(world)


async def test_a_loop_of_returns_is_answered_more_and_more_slowly(tmp_path):
    world = await a_world_with(tmp_path, 1000.0, 1000.0, 1000.0)
    number = world.ask().answer.request_idx
    answered = 0
    for _ in range(1000):  # a caller that comes back each millisecond, for a second
        world.clock.jump(0.001)
        answered += isinstance(world.ask(number), Placed)

    assert answered < 20
    await close(world)


async def test_a_rejected_request_prefers_another_worker_but_not_for_ever(tmp_path):
    world = await a_world_with(tmp_path, 10.0, 1.0)
    first = world.ask()
    world.finish(first.worker_id, first.answer.request_idx, "Rejected")
    world.clock.jump(4.0)

    second = world.ask(first.answer.request_idx)

    assert (first.worker_id, second.worker_id) == (1, 2)
    await close(world)


async def test_a_cancelled_request_is_no_success_and_frees_its_place(tmp_path):
    world = await a_world_with(tmp_path, 1.0)
    first = world.ask()
    full = world.ask()
    world.finish(1, first.answer.request_idx, "Cancelled")

    assert isinstance(full, Waits)
    assert isinstance(world.ask(full.answer.request_idx), Placed)
    assert world.plane.desk.queue.get(first.answer.request_idx).preferred == 0
    await close(world)


async def test_checklist_29_a_silent_worker_leaves_routing_and_then_fails(tmp_path):
    world = await a_world_with(tmp_path, 10.0)
    world.ready.clear()

    await world.tick(29.0)
    still = world.plane.workers.load(1).is_open
    await world.tick(2.0)
    silent = world.plane.workers.load(1).is_open
    await world.tick(20.0)

    assert (still, silent) == (True, False)
    assert world.states() == ["error"]
    await close(world)


async def test_checklist_30_rates_are_over_the_time_between_received_reports(tmp_path):
    world = await a_world_with(tmp_path, 10.0)
    world.clock.jump(10.0)

    world.report(1, score=10.0, cur_perf=1000.0)

    assert world.plane.workers.listing(1)[0]["cur_perf"] == pytest.approx(100.0)
    await close(world)


async def test_checklist_34_work_that_a_worker_lists_and_nobody_knows_is_counted(tmp_path):
    world = await a_world_with(tmp_path, 10.0)

    world.report(1, score=10.0, working=(4711, 4712), cur_load=500.0)

    load = world.plane.workers.load(1)
    assert (load.count, load.booked_cost) == (2, 500.0)
    assert load.is_leased
    await close(world)


async def test_a_booking_that_never_shows_up_is_let_go_after_ten_seconds_but_a_held_one_stays(tmp_path):
    world = await a_world_with(tmp_path, 1000.0)
    loose, held = world.ask(), world.ask(held=True)
    world.clock.jump(11.0)
    world.report(1, score=1000.0)

    load = world.plane.workers.load(1)
    assert load.booking(loose.answer.request_idx) is None
    assert load.booking(held.answer.request_idx) is not None
    await close(world)


async def test_a_wrong_token_changes_nothing(tmp_path):
    world = await a_world_with(tmp_path, 10.0)
    before = world.plane.workers.get(1)

    with pytest.raises(Unauthorized):
        world.plane.reports.status(WorkerStatusReport(id=1, mtoken="wrong", error_msg="broken"))

    assert world.plane.workers.get(1) == before
    await close(world)


async def test_a_slow_worker_is_flagged_against_its_peers_and_gets_less(tmp_path):
    world = await a_world_with(tmp_path)
    for _ in range(3):
        worker = await world.plane.lifecycle.register(1, 0)
        world.report(worker.id, score=10.0, gpu_name="RTX 4090")
    for _ in range(24):
        placed = world.ask()
        worker_id, request_idx = placed.worker_id, placed.answer.request_idx
        world.report(worker_id, score=10.0, working=(request_idx,))
        world.clock.jump(1.0)
        world.report(worker_id, score=10.0)  # a worker's status often arrives before what it says of the request
        world.finish(worker_id, request_idx, seconds=13.0 if worker_id == 3 else 10.0)

    slow, usual = world.plane.workers.get(3), world.plane.workers.get(1)

    assert "slower than its peers" in slow.flag
    assert usual.flag == ""
    assert world.plane.workers.load(3).score < 0.8 * world.plane.workers.load(1).score
    await close(world)


async def test_every_decision_in_the_store_replays_to_itself(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=3) as world:
        world.ask()
        await world.tick()
        world.report(1)
        await world.run(30)
        rows = await world.store.decisions(1)

        assert len(rows) >= 2
        for row in rows:
            recorded, again = replay(row.inputs, row.outcome)
            assert recorded == again


def test_the_state_table_is_what_reports_walk_on():
    for state in WorkerState:
        for report in (
            WorkerStatusReport(id=1),
            WorkerStatusReport(id=1, loadtime=1.0, max_perf=1.0),
            WorkerStatusReport(id=1, loadtime=1.0),
            WorkerStatusReport(id=1, error_msg="no"),
            WorkerStatusReport(id=1, stage="provisioning"),
        ):
            assert after_report(state, report) in WORKER_TRANSITIONS[state] | {state}
    assert WORKER_TRANSITIONS[WorkerState.DESTROYING] == frozenset()
    with pytest.raises(IllegalTransition):
        apply(WorkerState.DESTROYING, WorkerState.IDLE)


def test_models_that_are_not_warm_cost_their_swap_and_a_warm_worker_wins_until_its_queue_is_longer():
    warm, cold = WorkerLoad(score=1.0, is_open=True, swap_s=30.0), WorkerLoad(score=1.0, is_open=True, swap_s=30.0)
    warm.warm = frozenset({"wan"})
    want = Want(10.0, frozenset({"wan"}))

    def choice(now: float = 0.0):
        return choose({"cold": cold, "warm": warm}.items(), want, max_queue_time=100.0, now=now)

    assert choice() == "warm"
    for number in range(4):
        warm.book(Booking(request_idx=number, cost=10.0, at=0.0, models=want.models))
    assert choice() == "cold"


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.floats(0.5, 8.0), min_size=2, max_size=5),
    costs=st.lists(st.sampled_from([50.0, 100.0, 200.0]), min_size=200, max_size=260),
)
def test_shares_follow_scores_within_ten_percent(scores, costs):
    loads = {number: WorkerLoad(score=score, is_open=True) for number, score in enumerate(scores)}
    for request_idx, cost in enumerate(costs):
        chosen = choose(loads.items(), Want(cost), max_queue_time=1e9, now=0.0)
        assert not isinstance(chosen, Refusal)
        loads[chosen].book(Booking(request_idx=request_idx, cost=cost, at=0.0))
        loads[chosen] = loads.pop(chosen)

    total_cost, total_score = sum(costs), sum(scores)
    largest = max(costs)
    for load_number, load in loads.items():
        fair = total_cost * scores[load_number] / total_score
        # Ten percent, or one job where a share is only a few jobs.
        assert abs(load.booked_cost - fair) <= max(0.10 * fair, largest)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1.0, 500.0), st.booleans()), max_size=40), st.floats(0.1, 20.0))
def test_a_full_worker_is_never_chosen_and_a_load_is_what_is_booked(steps, score):
    load = WorkerLoad(score=score, is_open=True)
    for number, (cost, ends) in enumerate(steps):
        is_full = load.backlog(0.0) > 30.0 * score
        chosen = choose({1: load}.items(), Want(cost), max_queue_time=30.0, now=0.0)
        assert (chosen == 1) is not is_full
        if chosen == 1:
            load.book(Booking(request_idx=number, cost=cost, at=0.0))
        if ends and load.count:
            load.finish(next(iter(load.requests())), 0.0)
        assert load.booked_cost == pytest.approx(sum(load.booking(idx).cost for idx in load.requests()))


async def test_requests_that_have_their_workers_cost_the_cycle_collector_nothing(tmp_path):
    """A hundred thousand are remembered for minutes, and nobody is answered while it looks at them."""
    world = await a_world_with(tmp_path, 1e6)
    world.ask()
    gc.collect()
    before = len(gc.get_objects())

    placed = [isinstance(world.ask(), Placed) for _ in range(500)]
    gc.collect()

    assert all(placed)
    assert len(gc.get_objects()) - before < 50
    await close(world)

"""What goes wrong in a fleet while it is scaled: slow boots, bad versions, failing starts, recoveries, restarts."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.autoscaler import decide
from comfyfleet.control.demand import DemandMeter
from comfyfleet.control.placements import Placed
from comfyfleet.control.scaling import GroupFacts, Memory, Verb
from comfyfleet.control.scores import judged
from comfyfleet.control.simulator.files import FleetFile, GpuKind
from comfyfleet.control.simulator.simulation import Simulation
from comfyfleet.control.simulator.strategies import OurAutoscaler
from comfyfleet.control.simulator.trace import Arrival
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from support.routing_world import RoutingWorld
from support.scaling_facts import NOW, a_policy, a_worker, inputs, verbs

pytestmark = pytest.mark.anyio


# --- decisions -----------------------------------------------------------------------------------------------------


def test_a_ready_worker_is_not_stopped_for_one_that_still_boots():
    ready = a_worker(1, perf=2.0, last_work_at=0.0)
    provisioning = a_worker(2, WorkerState.LOADING, perf=2.0)

    for policy in (a_policy(min_load=1.0, cold_workers=2), a_policy(inactivity_timeout=-1.0, cold_workers=2)):
        assert verbs(decide(inputs(policy, ready, provisioning))) == []


def test_a_request_is_not_left_waiting_for_a_download_while_an_inactive_worker_could_wake():
    stopped = a_worker(1, WorkerState.STOPPED)
    downloading = a_worker(2, WorkerState.LOADING, perf=0.0)
    nearly_there = msgspec.structs.replace(downloading, created_at=NOW - 55.0)

    decision = decide(inputs(a_policy(), stopped, downloading, waiting=1))

    assert [(action.verb, action.worker_id) for action in decision.actions] == [(Verb.WAKE, 1)]
    assert "sooner" in decision.sentence
    assert verbs(decide(inputs(a_policy(), stopped, nearly_there, waiting=1))) == []


def test_as_many_go_as_were_spare_all_through_the_delay():
    busy = [a_worker(number, is_leased=True, last_work_at=NOW) for number in range(1, 5)]
    idle = [a_worker(number) for number in range(5, 9)]
    memory = Memory(over_since=NOW - 9999.0, over_least=1)

    decision = decide(inputs(a_policy(), *busy, *idle, memory=memory))

    assert verbs(decision) == ["stop"]
    assert (decision.memory.over_since, decision.memory.over_least) == (NOW, 3), "the others wait out a delay of theirs"


def test_a_steady_load_starts_and_stops_next_to_nobody():
    fleet = FleetFile(gpu=(GpuKind(name="gpu", score=1.0, boot_s=60.0, wake_s=20.0, swap_s=0.0, count=20),))
    arrivals = [Arrival(2.1 * number, 10.0, "", "") for number in range(1500)]  # half an hour of warming up, then

    run = Simulation(policy=a_policy(max_workers=20), fleet=fleet, strategy=OurAutoscaler()).run(arrivals)
    steady = [decision for decision in run.decisions if decision.t_s > 1800.0 and decision.t_s < arrivals[-1].t_s]

    assert sum(action.verb is Verb.WAKE for decision in steady for action in decision.actions) <= 2


def test_the_spend_breaker_opens_beside_a_worker_that_was_ready_before():
    healthy = a_worker(1, is_leased=True)
    booting = a_worker(2, WorkerState.LOADING, perf=0.0)
    memory = Memory(decided_at=NOW - 100.0, paid_boot_s=3590.0, failed_starts=5)

    decision = decide(inputs(a_policy(min_load=3.0), healthy, booting, memory=memory))

    assert decision.memory.breaker_since == NOW
    assert decision.memory.failed_starts == 5


def test_a_version_that_does_not_start_is_rolled_out_no_further():
    newer = (GroupFacts(id=1, generation=2, perf=1.0),)
    workers = [a_worker(number, generation=1) for number in range(1, 5)]
    policy = a_policy(min_load=3.6)

    assert verbs(decide(inputs(policy, *workers, groups=newer))) == ["update"]
    failed = Memory(decided_at=NOW - 1.0, failed_starts=1, failed_at=NOW - 1.0)
    assert verbs(decide(inputs(policy, *workers, groups=newer, memory=failed))) == []


def test_an_update_takes_the_inactive_before_anybody_who_is_ready():
    newer = (GroupFacts(id=1, generation=2, perf=1.0),)
    ready, inactive = a_worker(1, generation=1), a_worker(2, WorkerState.STOPPED, generation=1)

    decision = decide(inputs(a_policy(), ready, inactive, groups=newer))

    assert [action.worker_id for action in decision.actions] == [2]


def test_a_worker_that_is_going_away_counts_against_the_cap_until_it_is_gone():
    stopped = [a_worker(number, WorkerState.STOPPED) for number in range(1, 4)]
    going = a_worker(4, WorkerState.DESTROYING, intent="destroy")

    assert verbs(decide(inputs(a_policy(cold_workers=4, max_workers=4), *stopped, going))) == []


def test_over_the_cap_one_that_boots_goes_before_one_that_is_ready():
    ready, booting = a_worker(1, price_hour=1.0), a_worker(2, WorkerState.LOADING, price_hour=0.9)

    decision = decide(inputs(a_policy(max_workers=1, min_load=0.5), ready, booting))

    assert [(action.verb, action.worker_id) for action in decision.actions] == [(Verb.DESTROY, 2)]


def test_a_request_costs_on_average_what_the_last_ones_did():
    meter = DemandMeter()
    assert meter.rates(NOW).mean_cost == 100.0, "nobody knows yet"
    for number in range(100):
        meter.arrived(5.0, NOW + number)
    again = DemandMeter(meter.row(1))
    for number in range(200):
        again.arrived(50.0, NOW + 100 + number)

    assert meter.rates(NOW + 100).mean_cost == 5.0
    assert again.rates(NOW + 300).mean_cost == pytest.approx(50.0, rel=0.01)


@pytest.mark.parametrize(
    ("slowness", "corrected"),
    [([1.0, 3.0], [1.0, 1 / 3]), ([1.0, 1.0, 3.0, 3.0], [1.0, 1.0, 1 / 3, 1 / 3]), ([1.0, 1.0, 1.25], [1.0, 1.0, 0.8])],
)
def test_jobs_correct_the_slow_worker_down_and_not_its_peers_up(slowness, corrected):
    workers = [
        Worker(id=number, endpoint_id=1, group_id=1, mtoken="", created_at=0.0, measured_perf=1.0, gpu_name="RTX 4090")
        for number in range(len(slowness))
    ]

    verdicts = judged(list(zip(workers, slowness, strict=True)))

    assert [verdict.living_perf or 1.0 for verdict in verdicts] == pytest.approx(corrected)


# --- the loop ------------------------------------------------------------------------------------------------------


async def ready(world: RoutingWorld) -> None:
    """Whatever is starting reports that it is."""
    for _ in range(6):
        await world.tick()
        for worker_id in world.worker_ids():
            if world.plane.workers.get(worker_id).state != WorkerState.IDLE:
                world.report(worker_id)


async def test_a_version_that_fails_at_once_takes_one_worker_and_not_the_fleet(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=4, max_workers=4, min_load=3.5) as world:
        await ready(world)
        world.catalog.put_workergroup(msgspec.structs.replace(world.group, update_generation=1, is_updating=True))
        counts = []
        for _ in range(60):
            await world.tick()
            for worker_id in world.worker_ids():
                worker = world.plane.workers.get(worker_id)
                if worker.generation == 1 and worker.state not in ("idle", "error", "destroying"):
                    world.report(worker_id, loadtime=0.0, score=0.0, error_msg="the new version does not start")
                elif worker.state == "idle" and world.clock.now() - worker.last_report_at >= 9:
                    world.report(worker_id)
            counts.append(world.states().count("idle"))

        assert min(counts) == 3


async def test_a_worker_that_recovers_while_its_restart_is_written_down_keeps_its_request(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1, min_load=0.5) as world:
        await ready(world)
        write, placed = world.store.add_decision, []

        async def write_slowly(row, **fields):
            if "estart" in row.sentence:
                world.report(1)
                placed.append(world.ask())
                world.report(1, working=(placed[0].answer.request_idx,))
            return await write(row, **fields)

        world.store.add_decision = write_slowly
        while not placed:
            world.report(1, error_msg="CUDA hiccup")
            for _ in range(8):
                await world.tick()

        assert isinstance(placed[0], Placed)
        assert (world.states(), world.plane.workers.load(1).is_leased) == (["idle"], True)


async def test_a_worker_that_begins_again_after_hours_is_given_its_time(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1, min_load=0.5) as world:
        await ready(world)
        await world.run(8000)
        request_idx = world.ask().answer.request_idx
        world.report(1, working=(request_idx,))

        world.report(1, loadtime=0.0, score=0.0, working=(request_idx,), stage="engine_start")
        await world.tick()

        assert world.states() == ["model_loading"]
        assert world.plane.workers.load(1).is_leased


async def test_an_open_breaker_outlives_a_restart(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0, max_workers=1) as world:
        world.ask(replay_timeout=36000.0)
        for _ in range(4000):
            await world.tick()
            if world.worker_ids():
                world.report(1, loadtime=0.0, score=0.0, stage="benchmark")
        before = world.plane.reconciler.inputs(world.endpoint).memory.breaker_since

        await world.restart()
        await world.tick()

        assert before > 0
        assert world.plane.reconciler.inputs(world.endpoint).memory.breaker_since == before


async def test_a_worker_that_was_needed_before_a_restart_is_not_stopped_for_the_restart(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=1, max_workers=1) as world:
        asked = world.ask()
        await ready(world)
        placed = world.ask(asked.answer.request_idx)
        world.report(1, working=(placed.answer.request_idx,))
        world.finish(1, placed.answer.request_idx)
        world.report(1)

        await world.restart()
        world.report(1)
        await world.tick()

        assert world.states() == ["idle"]

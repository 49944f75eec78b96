"""Each scaling parameter and threshold has its effect: turned off or moved, one of these promises breaks."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.autoscaler import decide
from comfyfleet.control.demand import Demand, DemandMeter, DemandRates
from comfyfleet.control.scaling import Decision, Memory, ScalePolicy, WorkerFacts
from comfyfleet.control.scores import Scores, Verdict
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.control.workers import Workers
from support.scaling_facts import NOW, a_policy, a_worker, inputs, verbs

HOUR_S = 3600.0
# There has been too much capacity for longer than anything waits before it is let go.
LONG_OVER = Memory(over_since=NOW - 9999.0)


def done(decision: Decision) -> list[tuple[str, int]]:
    return [(str(action.verb), action.worker_id) for action in decision.actions]


# --- the cold pool: cold_mult, min_cold_load, cold_workers ------------------------------------------------------------


def pool_grown_from(policy: ScalePolicy, *workers: WorkerFacts) -> list[WorkerFacts]:
    """The fleet once nothing more is created; each new worker scores 100 and becomes inactive before the next look."""
    fleet = list(workers)
    while created := verbs(decide(inputs(policy, *fleet))):
        assert created == ["create"]
        loading = a_worker(len(fleet) + 1, WorkerState.LOADING, perf=0.0)
        # What is still loading may already be enough: nothing is created beside it.
        assert verbs(decide(inputs(policy, *fleet, loading))) == []
        fleet.append(msgspec.structs.replace(loading, state=WorkerState.STOPPED, perf=100.0))
    return fleet


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({"cold_mult": 1.0}, 100.0),
        ({"cold_mult": 2.0}, 200.0),
        ({"cold_mult": 3.5}, 400.0),
        ({"cold_mult": 1.0, "min_cold_load": 300.0}, 300.0),
        ({"cold_mult": 2.0, "min_cold_load": 150.0}, 200.0),
    ],
)
def test_the_pool_grows_one_by_one_to_the_capacity_that_cold_mult_and_min_cold_load_ask_for(fields, total):
    ready = a_worker(1, perf=100.0)

    fleet = pool_grown_from(a_policy(min_load=90.0, target_util=0.9, **fields), ready)

    assert sum(worker.perf for worker in fleet) == total


def test_a_pool_bigger_than_cold_workers_goes_one_by_one_after_six_hours_unused_and_stops_there():
    def unused(hours: float, count: int) -> list[WorkerFacts]:
        return [a_worker(n, WorkerState.STOPPED, state_since=NOW - hours * HOUR_S) for n in range(1, count + 1)]

    policy = a_policy(cold_workers=2)

    assert verbs(decide(inputs(policy, *unused(5.9, 4)))) == []
    assert verbs(decide(inputs(policy, *unused(6.1, 4)))) == ["destroy"]
    assert verbs(decide(inputs(policy, *unused(6.1, 3)))) == ["destroy"]
    assert verbs(decide(inputs(policy, *unused(6.1, 2)))) == []


def test_a_pool_keeps_what_cold_mult_asks_for_and_a_bit_more_however_long_it_was_unused():
    policy = a_policy(min_load=90.0, cold_mult=2.0)
    ready = a_worker(1, perf=100.0)
    unused = [a_worker(n, WorkerState.STOPPED, perf=100.0, state_since=NOW - 99 * HOUR_S) for n in (2, 3, 4)]

    asked_for = decide(inputs(policy, ready, *unused[:1]))
    a_bit_more = decide(inputs(policy, ready, *unused[:2]))
    far_more = decide(inputs(policy, ready, *unused))

    assert verbs(asked_for) == verbs(a_bit_more) == []
    assert verbs(far_more) == ["destroy"]


# --- the last active worker: inactivity_timeout, what waits -----------------------------------------------------------


def test_a_negative_inactivity_timeout_never_leaves_an_endpoint_without_an_active_worker():
    policy = a_policy(inactivity_timeout=-1.0)
    idle_for_days = a_worker(1, last_work_at=NOW - 100 * HOUR_S)

    assert verbs(decide(inputs(policy))) == ["create"]
    assert done(decide(inputs(policy, a_worker(1, WorkerState.STOPPED)))) == [("wake", 1)]
    assert verbs(decide(inputs(policy, idle_for_days, memory=LONG_OVER))) == []


@pytest.mark.parametrize(
    ("timeout", "idle_s", "stopped"),
    [(300.0, 299.0, 1), (300.0, 301.0, 2), (900.0, 301.0, 1), (None, 61.0, 2), (0.0, 61.0, 2)],
)
def test_one_ready_worker_stays_until_inactivity_timeout_after_the_last_work_and_then_goes(timeout, idle_s, stopped):
    workers = [a_worker(n, last_work_at=NOW - idle_s) for n in (1, 2)]

    decision = decide(inputs(a_policy(inactivity_timeout=timeout), *workers, memory=LONG_OVER))

    assert verbs(decision) == ["stop"] * stopped


@pytest.mark.parametrize("timeout", [None, 0.0, 300.0])
def test_no_inactivity_timeout_but_a_negative_one_makes_a_worker_where_there_is_none(timeout):
    assert verbs(decide(inputs(a_policy(inactivity_timeout=timeout)))) == []


def test_the_last_ready_worker_is_kept_while_a_request_waits_however_soon_it_will_be_begun():
    quick = a_worker(1, perf=100.0)

    waited_for = decide(inputs(a_policy(), quick, waiting=1, memory=LONG_OVER))
    missed_by_nobody = decide(inputs(a_policy(), quick, memory=LONG_OVER))

    assert verbs(waited_for) == []
    assert verbs(missed_by_nobody) == ["stop"]


@pytest.mark.parametrize("target_queue_time", [10.0, 1e12])
@pytest.mark.parametrize("cost", [0.0, 1e-6])
def test_a_request_that_costs_next_to_nothing_still_brings_one_worker(target_queue_time, cost):
    tiny = Demand(waiting=1, waiting_cost=cost, rates=DemandRates(last_arrival_at=NOW - 1.0))

    decision = decide(inputs(a_policy(target_queue_time=target_queue_time), demand=tiny))

    assert verbs(decision) == ["create"]


# --- more load: target_queue_time, a rising rate ----------------------------------------------------------------------


@pytest.mark.parametrize(("target_queue_time", "woken"), [(50.0, 0), (30.0, 1), (10.0, 2)])
def test_a_queue_of_forty_seconds_wakes_more_the_less_target_queue_time_allows(target_queue_time, woken):
    busy = a_worker(1, perf=10.0, is_leased=True)
    stopped = [a_worker(n, WorkerState.STOPPED, perf=10.0) for n in (2, 3, 4)]

    # 400 load units for 10 load/s; half of them are done before another worker can help.
    decision = decide(
        inputs(a_policy(target_queue_time=target_queue_time), busy, *stopped, waiting=4, memory=Memory(wake_s=20.0))
    )

    assert verbs(decision) == ["wake"] * woken


@pytest.mark.parametrize(("target_queue_time", "woken"), [(2.0, 2), (10.0, 0)])
def test_a_queue_of_five_seconds_is_too_long_only_for_a_shorter_target_queue_time(target_queue_time, woken):
    busy = a_worker(1, perf=100.0, is_leased=True)
    stopped = [a_worker(n, WorkerState.STOPPED, perf=100.0) for n in (2, 3, 4)]

    decision = decide(
        inputs(a_policy(target_queue_time=target_queue_time), busy, *stopped, waiting=5, memory=Memory(wake_s=1.0))
    )

    assert verbs(decision) == ["wake"] * woken


def test_a_steeply_rising_rate_wakes_more_workers_than_a_steady_one_of_the_same_level():
    def minute_of(before: int, lately: int) -> Demand:
        """So many requests of one load unit in each second, lately: in the last 15 s."""
        meter = DemandMeter()
        for age_s in range(60, 0, -1):
            for _ in range(lately if age_s <= 15 else before):
                meter.arrived(1.0, NOW - age_s)
        return Demand(rates=meter.rates(NOW))

    busy = a_worker(1, perf=25.0, is_leased=True)
    stopped = [a_worker(n, WorkerState.STOPPED, perf=25.0) for n in range(2, 13)]
    memory = Memory(wake_s=20.0)

    steady = decide(inputs(a_policy(), busy, *stopped, demand=minute_of(100, 100), memory=memory))
    rising = decide(inputs(a_policy(), busy, *stopped, demand=minute_of(10, 100), memory=memory))

    # 100 load/s at 90 % are five workers of 25.
    assert verbs(steady) == ["wake"] * 4
    assert len(verbs(rising)) > 4
    assert set(verbs(rising)) == {"wake"}


# --- failed workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failed_for_s", "expected"), [(5.0, []), (119.0, []), (121.0, [("destroy", 2)])], ids=lambda value: str(value)
)
def test_a_failed_worker_that_nobody_needs_is_not_restarted_and_goes_after_two_minutes(failed_for_s, expected):
    enough = a_worker(1)
    failed = a_worker(2, WorkerState.ERROR, failures=1, state_since=NOW - failed_for_s)

    decision = decide(inputs(a_policy(min_load=0.9), enough, failed))

    assert done(decision) == expected


@pytest.mark.parametrize("fields", [{"cold_workers": 2, "min_load": 0.9}, {"min_load": 1.8}], ids=["pool", "load"])
def test_a_failed_worker_that_the_pool_or_the_load_needs_is_restarted_however_long_ago_it_failed(fields):
    too_few = a_worker(1)
    failed = a_worker(2, WorkerState.ERROR, failures=1, state_since=NOW - 1000.0)

    # Only one that has work makes an expected load a reason to start another.
    decision = decide(inputs(a_policy(**fields), msgspec.structs.replace(too_few, is_leased=True), failed))

    assert done(decision) == [("reboot", 2)]


# --- scores: who is flagged, and what that costs ----------------------------------------------------------------------


def a_card(worker_id: int, score: float = 100.0) -> Worker:
    return Worker(
        id=worker_id,
        endpoint_id=1,
        group_id=1,
        mtoken="t",
        created_at=0.0,
        state=WorkerState.IDLE,
        gpu_name="RTX 4090",
        measured_perf=score,
    )


def verdict_of(scores: Scores, judged: Worker, *peers: Worker) -> Verdict:
    return next(verdict for verdict in scores.judge([judged, *peers]) if verdict.worker_id == judged.id)


@pytest.mark.parametrize(("share", "is_flagged"), [(0.79, True), (0.81, False)])
def test_a_worker_is_flagged_by_its_jobs_when_it_does_less_than_four_fifths_of_its_peers_work(share, is_flagged):
    scores, slow, peers = Scores(), a_card(1), [a_card(2), a_card(3), a_card(4)]

    for _ in range(5):
        scores.ran(slow, cost=100.0, seconds=1.0 / share)
        for peer in peers:
            scores.ran(peer, cost=100.0, seconds=1.0)
    verdict = verdict_of(scores, slow, *peers)

    assert verdict.living_perf == pytest.approx(100.0 * share)
    assert verdict.flag == ("21 % slower than its peers with the same GPU, by its jobs" if is_flagged else "")


@pytest.mark.parametrize(("score", "is_flagged"), [(79.0, True), (81.0, False)])
def test_before_its_first_jobs_a_worker_is_flagged_by_its_benchmark_at_the_same_limit(score, is_flagged):
    verdict = verdict_of(Scores(), a_card(1, score), a_card(2), a_card(3), a_card(4))

    assert verdict.living_perf == 0.0
    assert verdict.flag == ("21 % slower than its peers with the same GPU, by its benchmark" if is_flagged else "")


def test_a_worker_flagged_by_its_benchmark_alone_is_routed_to_as_if_it_scored_a_quarter_less():
    workers, slow, peers = Workers(), a_card(1, 60.0), [a_card(2), a_card(3), a_card(4)]
    for worker in (slow, *peers):
        workers.add(worker, NOW)
    assert workers.load(slow.id).score == 60.0

    verdict = verdict_of(Scores(), slow, *peers)
    workers.change(slow.id, NOW, living_perf=verdict.living_perf, flag=verdict.flag)

    assert workers.load(slow.id).score == 45.0
    assert [workers.load(peer.id).score for peer in peers] == [100.0] * 3

"""Scaling decisions: the documents' worked examples, what is never done, and laws over any fleet."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyfleet.control.autoscaler import decide
from comfyfleet.control.demand import Demand, DemandRates
from comfyfleet.control.scaling import GroupFacts, Memory, ScalePolicy, ScalingInputs, Verb, WorkerFacts, replay
from comfyfleet.control.targets import active_floor, active_target, is_quiet, queue_target, total_target, workers_for
from comfyfleet.control.worker_states import ACTIVE, WorkerState
from support.scaling_facts import NOW, a_policy, a_worker, inputs, verbs

# --- the documents' examples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("util", "spare_percent"), [(0.9, 11.1), (0.8, 25.0), (0.5, 100.0), (0.4, 150.0)], ids=lambda value: str(value)
)
def test_target_util_leaves_the_documented_spare_capacity(util, spare_percent):
    assert (active_target(a_policy(target_util=util), 100.0) / 100.0 - 1) * 100 == pytest.approx(
        spare_percent, abs=0.02
    )


def test_nine_hundred_load_at_ninety_percent_asks_for_a_thousand():
    assert active_target(a_policy(target_util=0.9), 900.0) == pytest.approx(1000.0)


def test_an_active_hundred_with_a_multiplier_of_two_keeps_another_hundred_inactive():
    assert total_target(a_policy(cold_mult=2.0), 100.0) - 100.0 == 100.0


@pytest.mark.parametrize(("active", "inactive"), [(100.0, 200.0), (150.0, 150.0)])
def test_min_cold_load_is_a_floor_of_the_total(active, inactive):
    assert total_target(a_policy(cold_mult=1.0, min_cold_load=300.0), active) - active == inactive


def test_load_of_exactly_one_workers_score_takes_two_at_ninety_percent():
    assert workers_for(active_target(a_policy(target_util=0.9), 1.0), perf=1.0) == 2
    assert workers_for(0.9 / 0.9, perf=1.0) == 1


def test_min_load_of_one_keeps_a_worker_active_for_ever():
    idle = a_worker(1, perf=2.0)

    decision = decide(inputs(a_policy(min_load=1.0), idle, memory=Memory(over_since=NOW - 9999.0)))

    assert verbs(decision) == []


@pytest.mark.parametrize(
    ("timeout", "idle_s", "floor"), [(None, 0, 0), (0, 0, 0), (-1, 1e9, 1), (300, 299, 1), (300, 300, 0)]
)
def test_inactivity_timeout_gates_the_way_to_zero_as_documented(timeout, idle_s, floor):
    assert active_floor(a_policy(inactivity_timeout=timeout), active_now=3, idle_s=idle_s) == floor


def test_an_endpoint_is_taken_for_quiet_only_after_its_timeout():
    assert not is_quiet(a_policy(inactivity_timeout=600), idle_s=599, wake_s=20)
    assert is_quiet(a_policy(inactivity_timeout=600), idle_s=600, wake_s=20)


def test_a_queue_over_its_target_time_asks_for_more_and_one_within_it_for_nothing():
    policy = a_policy(target_queue_time=10.0)
    long = Demand(waiting=10, waiting_cost=100.0)

    assert queue_target(policy, long, backlog=0.0, ready=1.0, perf=1.0, lead_s=20.0) > 1.0
    assert queue_target(policy, long, backlog=0.0, ready=50.0, perf=1.0, lead_s=20.0) == 0.0


def test_one_waiting_job_never_asks_for_more_than_one_worker():
    huge = Demand(waiting=1, waiting_cost=10_000.0)

    assert queue_target(a_policy(), huge, backlog=0.0, ready=0.0, perf=1.0, lead_s=20.0) == 1.0


# --- growing -------------------------------------------------------------------------------------------------------


def test_an_inactive_worker_is_woken_before_one_is_created():
    decision = decide(inputs(a_policy(), a_worker(1, WorkerState.STOPPED), waiting=1))

    assert [(str(action.verb), action.worker_id) for action in decision.actions] == [("wake", 1)]
    assert "Wake worker 1: 1 request waits and no worker is active" in decision.sentence


def test_a_drain_is_taken_back_before_anything_is_woken():
    draining = a_worker(1, intent="stop")

    decision = decide(inputs(a_policy(), draining, a_worker(2, WorkerState.STOPPED), waiting=1))

    assert verbs(decision) == ["keep"]


def test_a_worker_that_is_starting_is_waited_for():
    assert verbs(decide(inputs(a_policy(), a_worker(1, WorkerState.STARTING), waiting=1))) == []


def test_while_no_score_is_known_only_a_few_workers_are_tried():
    learning = (GroupFacts(id=1, test_workers=2),)

    decision = decide(inputs(a_policy(), waiting=50, groups=learning))

    assert verbs(decision) == ["create", "create"]


def test_the_cold_pool_is_filled_to_cold_workers_without_any_load():
    assert verbs(decide(inputs(a_policy(cold_workers=2)))) == ["create"]
    assert verbs(decide(inputs(a_policy(cold_workers=1), a_worker(1, WorkerState.STOPPED)))) == []


def test_a_rate_alone_wakes_nobody_while_a_worker_stands_idle():
    policy, stopped = a_policy(), a_worker(2, WorkerState.STOPPED)

    calm = decide(inputs(policy, a_worker(1, last_work_at=NOW), stopped, rate=1.0))
    stretched = decide(inputs(policy, a_worker(1, is_leased=True, last_work_at=NOW), stopped, rate=1.0))

    assert verbs(calm) == []
    assert verbs(stretched) == ["wake"]


# --- shrinking -----------------------------------------------------------------------------------------------------


def test_surplus_is_stopped_only_after_it_was_surplus_for_a_while():
    policy, workers = a_policy(), (a_worker(1), a_worker(2))
    first = decide(inputs(policy, *workers))
    soon = decide(inputs(policy, *workers, memory=msgspec.structs.replace(first.memory, over_since=NOW - 5.0)))
    later = decide(inputs(policy, *workers, memory=msgspec.structs.replace(first.memory, over_since=NOW - 60.0)))

    assert verbs(first) == []
    assert first.memory.over_since == NOW
    assert verbs(soon) == []
    assert verbs(later) == ["stop", "stop"]


def test_the_worst_price_for_performance_goes_first():
    dear, cheap = a_worker(1, price_hour=4.0), a_worker(2, price_hour=1.0)
    over = Memory(over_since=NOW - 100.0)

    decision = decide(inputs(a_policy(min_load=0.9), dear, cheap, memory=over))

    assert [(str(action.verb), action.worker_id) for action in decision.actions] == [("stop", 1)]


def test_one_that_was_never_needed_sleeps_straight_after_its_benchmark():
    assert verbs(decide(inputs(a_policy(cold_workers=1), a_worker(1, last_work_at=0.0)))) == ["stop"]


def test_a_leased_worker_is_never_stopped_for_lack_of_load():
    busy = a_worker(1, is_leased=True)

    assert verbs(decide(inputs(a_policy(), busy, memory=Memory(over_since=NOW - 9999.0)))) == []


def test_lowering_max_workers_lets_inactive_ones_go_first():
    workers = (a_worker(1, is_leased=True), a_worker(2, WorkerState.STOPPED), a_worker(3))

    decision = decide(inputs(a_policy(max_workers=2), *workers))

    assert [(str(action.verb), action.worker_id) for action in decision.actions] == [("destroy", 2)]


def test_a_workers_group_that_is_deleted_takes_its_workers_along():
    gone = (GroupFacts(id=1, is_deleted=True),)

    assert verbs(decide(inputs(a_policy(cold_workers=1), a_worker(1), groups=gone))) == ["destroy"]


# --- states of the endpoint, failures -------------------------------------------------------------------------------


def test_a_suspended_endpoint_is_left_alone_and_says_so():
    decision = decide(inputs(a_policy(state="suspended"), a_worker(1), waiting=5))

    assert verbs(decision) == []
    assert "suspended" in decision.reason


def test_a_stopped_endpoint_drains_what_is_active_and_a_deleted_one_everything():
    workers = (a_worker(1), a_worker(2, WorkerState.STOPPED))

    assert verbs(decide(inputs(a_policy(state="stopped"), *workers))) == ["stop"]
    assert verbs(decide(inputs(a_policy(state="destroyed"), *workers))) == ["destroy", "destroy"]


def test_a_failed_worker_that_is_needed_is_restarted_after_a_pause_and_replaced_after_three_failures():
    def failed(failures: int, since_s: float) -> WorkerFacts:
        return a_worker(1, WorkerState.ERROR, failures=failures, state_since=NOW - since_s)

    assert verbs(decide(inputs(a_policy(), failed(1, 1.0), waiting=1)))[:1] != ["reboot"]
    assert verbs(decide(inputs(a_policy(), failed(1, 5.0), waiting=1))) == ["reboot"]
    assert verbs(decide(inputs(a_policy(), failed(3, 5.0), waiting=1))) == ["destroy"]


def test_a_crash_loop_is_never_called_capacity_and_capacity_never_a_crash_loop():
    looping = Memory(failed_starts=4, failed_at=NOW - 1.0, last_error="CUDA driver too old")
    full = Memory(no_capacity_until=NOW + 10.0, no_capacity="all 2 slots of this machine are taken")

    crash = decide(inputs(a_policy(), waiting=1, memory=looping))
    capacity = decide(inputs(a_policy(), waiting=1, memory=full))

    assert verbs(crash) == verbs(capacity) == []
    assert "crash loop" in crash.reason
    assert "CUDA driver too old" in crash.reason
    assert "capacity" not in crash.reason
    assert "no capacity" in capacity.reason
    assert "crash" not in capacity.reason


def test_paid_starting_time_without_a_ready_worker_opens_the_breaker():
    booting = a_worker(1, WorkerState.LOADING, perf=0.0)
    memory = Memory(decided_at=NOW - 100.0, paid_boot_s=3590.0)

    opened = decide(inputs(a_policy(), booting, memory=memory))
    refused = decide(inputs(a_policy(), waiting=3, memory=opened.memory))
    healed = decide(inputs(a_policy(), a_worker(2, state_since=NOW), memory=opened.memory))

    assert opened.memory.breaker_since == NOW
    assert verbs(refused) == []
    assert "spend breaker" in refused.reason
    assert healed.memory.breaker_since == 0.0


def test_a_rolling_update_touches_a_quarter_at_a_time_and_idle_ones_first():
    newer = (GroupFacts(id=1, generation=2, perf=1.0),)
    workers = [a_worker(n, is_leased=n < 3, last_work_at=NOW, generation=1) for n in range(1, 9)]

    first = decide(inputs(a_policy(min_load=8.0, max_workers=8), *workers, groups=newer))
    workers[2] = msgspec.structs.replace(workers[2], intent="update")
    workers[3] = msgspec.structs.replace(workers[3], intent="update")
    second = decide(inputs(a_policy(min_load=8.0, max_workers=8), *workers, groups=newer))

    assert [(str(action.verb), action.worker_id) for action in first.actions] == [("update", 3), ("update", 4)]
    assert "update" not in verbs(second)


# --- laws ----------------------------------------------------------------------------------------------------------

facts = st.builds(
    WorkerFacts,
    id=st.integers(1, 10_000),
    group_id=st.integers(1, 2),
    state=st.sampled_from(list(WorkerState)),
    state_since=st.floats(NOW - 5000, NOW),
    created_at=st.just(NOW - 9000.0),
    perf=st.floats(0.0, 50.0),
    is_leased=st.booleans(),
    backlog=st.floats(0.0, 5000.0),
    last_work_at=st.sampled_from([0.0, NOW - 500.0, NOW - 1.0]),
    intent=st.sampled_from(["", "", "", "stop", "destroy", "update"]),
    failures=st.integers(0, 4),
    is_foreign=st.booleans(),
    price_hour=st.floats(0.0, 10.0),
)
any_inputs = st.builds(
    ScalingInputs,
    policy=st.builds(
        ScalePolicy,
        endpoint_id=st.just(1),
        state=st.sampled_from(["active", "active", "active", "suspended", "stopped", "destroyed"]),
        min_load=st.floats(0.0, 100.0),
        target_util=st.floats(0.05, 1.0),
        cold_mult=st.floats(1.0, 5.0),
        min_cold_load=st.floats(0.0, 100.0),
        cold_workers=st.integers(0, 20),
        max_workers=st.integers(0, 20),
        inactivity_timeout=st.sampled_from([None, -1.0, 0.0, 60.0, 3600.0]),
    ),
    groups=st.just((GroupFacts(id=1, perf=1.0), GroupFacts(id=2))),
    demand=st.builds(
        Demand,
        waiting=st.integers(0, 10_000),
        waiting_cost=st.floats(0.0, 1e6),
        rates=st.builds(
            DemandRates, short=st.floats(0, 1e4), middle=st.floats(0, 1e4), long=st.floats(0, 1e4),
            trend=st.floats(-100, 100), last_arrival_at=st.sampled_from([0.0, NOW - 1.0, NOW - 100.0]),
        ),
    ),
    workers=st.lists(facts, max_size=8, unique_by=lambda worker: worker.id).map(tuple),
    memory=st.builds(Memory, over_since=st.sampled_from([0.0, NOW - 1000.0]), failed_starts=st.integers(0, 9)),
    now=st.just(NOW),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(any_inputs)
def test_the_fleet_never_leaves_its_bounds(given_inputs):
    decision = decide(given_inputs)

    created = verbs(decision).count("create")
    assert created <= max(0, given_inputs.policy.max_workers - len(given_inputs.workers)) or created == 0
    if given_inputs.policy.state != "active":
        assert created == 0
    stopped = {action.worker_id for action in decision.actions if action.verb is Verb.DESTROY}
    living = [worker for worker in given_inputs.workers if worker.intent != "destroy" and not worker.is_foreign]
    if given_inputs.policy.state == "active" and not any(worker.state is WorkerState.ERROR for worker in living):
        # What is let go never takes the fleet below its floor (as far as it was above).
        floor = min(given_inputs.policy.cold_workers, given_inputs.policy.max_workers, len(living))
        assert len([worker for worker in living if worker.id not in stopped]) >= floor


@settings(max_examples=100, deadline=None)
@given(any_inputs)
def test_no_leased_worker_is_stopped_to_save_capacity(given_inputs):
    leased = {worker.id for worker in given_inputs.workers if worker.is_leased and worker.state in ACTIVE}

    decision = decide(given_inputs)

    if given_inputs.policy.state == "active":
        assert not {a.worker_id for a in decision.actions if a.verb in (Verb.STOP, Verb.REBOOT)} & leased


@settings(max_examples=60, deadline=None)
@given(any_inputs)
def test_a_recorded_decision_replays_to_the_same_result(given_inputs):
    decision = decide(given_inputs)

    recorded, again = replay(msgspec.json.encode(given_inputs).decode(), msgspec.json.encode(decision).decode())

    assert recorded == again == decision


@settings(max_examples=60, deadline=None)
@given(any_inputs)
def test_every_decision_and_every_wait_is_explained(given_inputs):
    decision = decide(given_inputs)

    assert decision.sentence.endswith(".")
    assert decision.reason

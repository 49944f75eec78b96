"""When a job's silent worker is waited for, when another gets the job, and when it is stopped."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.jobs import Job, rank
from comfyfleet.control.leases import Fate, Silence, avoided, fate, is_abandoned, is_left_behind
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.wire.jobs import JobStatus

NOW = 1_000_000.0


def a_job(**fields) -> Job:
    values = {
        "id": "j",
        "endpoint_id": 1,
        "scope": "admin",
        "status": JobStatus.RUNNING,
        "priority": 0,
        "cost": 100.0,
        "rank": rank(NOW, 0),
        "created_at": NOW,
        "not_before": 0.0,
        "input": "{}",
        "digest": "",
    }
    return Job(**{**values, **fields})


def a_worker(state: WorkerState = WorkerState.IDLE, **fields) -> Worker:
    return Worker(id=7, endpoint_id=1, group_id=1, mtoken="m", created_at=NOW, state=state, **fields)


def test_a_silent_worker_has_its_time_and_then_loses_the_job():
    silence = Silence(since=NOW, lost_after_s=20)

    assert fate(a_job(), a_worker(), silence, NOW + 19.9) is Fate.WAIT
    assert fate(a_job(), a_worker(), silence, NOW + 20) is Fate.RUN_ELSEWHERE


@pytest.mark.parametrize("state", [WorkerState.ERROR, WorkerState.STOPPED, WorkerState.DESTROYING])
def test_a_worker_that_is_known_to_be_gone_is_not_waited_for(state):
    silence = Silence(since=NOW)

    assert fate(a_job(), a_worker(state), silence, NOW) is Fate.RUN_ELSEWHERE
    assert fate(a_job(), None, silence, NOW) is Fate.RUN_ELSEWHERE
    assert fate(a_job(), a_worker(state, is_foreign=True), silence, NOW) is Fate.WAIT


@pytest.mark.parametrize("before", [[1, 2], [7, 7]])
def test_a_job_whose_worker_was_lost_three_times_is_stopped_be_it_one_worker_or_three(before):
    lost_twice = a_job(lost_workers=msgspec.json.encode(before).decode())
    lost_once = a_job(lost_workers=msgspec.json.encode(before[:1]).decode())

    assert fate(lost_twice, None, Silence(since=NOW), NOW) is Fate.POISON
    assert fate(lost_once, None, Silence(since=NOW), NOW) is Fate.RUN_ELSEWHERE


def test_a_worker_that_lost_the_job_is_avoided_only_while_another_is_ready_or_on_its_way():
    lost = frozenset({7})
    loser = a_worker()

    for state in (WorkerState.IDLE, WorkerState.LOADING, WorkerState.REBOOTING):
        assert avoided(lost, [loser, msgspec.structs.replace(a_worker(state), id=8)]) == lost
    for state in (WorkerState.ERROR, WorkerState.STOPPED, WorkerState.DESTROYING):
        assert avoided(lost, [loser, msgspec.structs.replace(a_worker(state), id=8)]) == frozenset()
    leaving = msgspec.structs.replace(a_worker(intent="stop"), id=8)
    assert avoided(lost, [loser, leaving]) == avoided(lost, [loser]) == frozenset()


def test_a_worker_is_told_to_drop_a_job_only_while_it_is_somebody_elses():
    assert is_left_behind(a_job(worker_id=8), 7)
    assert is_left_behind(a_job(status=JobStatus.COMPLETED, worker_id=8), 7)
    assert not is_left_behind(a_job(worker_id=7), 7)
    assert not is_left_behind(a_job(status=JobStatus.QUEUED), 7)
    assert not is_left_behind(None, 7)


def test_a_lease_is_abandoned_when_it_expired_and_nobody_here_holds_it():
    job = a_job(lease_token="t", lease_expires=NOW)

    assert is_abandoned(job, frozenset(), NOW)
    assert not is_abandoned(job, frozenset({"t"}), NOW)
    assert not is_abandoned(job, frozenset(), NOW - 1)

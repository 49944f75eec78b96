"""When a job's silent worker is waited for, when another gets the job, and when it is stopped."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.jobs import Job, rank
from comfyfleet.control.leases import Fate, Silence, fate, is_abandoned
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

    assert fate(a_job(), 7, a_worker(), silence, NOW + 19.9) is Fate.WAIT
    assert fate(a_job(), 7, a_worker(), silence, NOW + 20) is Fate.RUN_ELSEWHERE


@pytest.mark.parametrize("state", [WorkerState.ERROR, WorkerState.STOPPED, WorkerState.DESTROYING])
def test_a_worker_that_is_known_to_be_gone_is_not_waited_for(state):
    silence = Silence(since=NOW)

    assert fate(a_job(), 7, a_worker(state), silence, NOW) is Fate.RUN_ELSEWHERE
    assert fate(a_job(), 7, None, silence, NOW) is Fate.RUN_ELSEWHERE
    assert fate(a_job(), 7, a_worker(state, is_foreign=True), silence, NOW) is Fate.WAIT


def test_a_job_that_took_three_different_workers_along_is_stopped():
    lost_two = a_job(lost_workers=msgspec.json.encode([1, 2]).decode())

    assert fate(lost_two, 7, None, Silence(since=NOW), NOW) is Fate.POISON
    assert fate(lost_two, 2, None, Silence(since=NOW), NOW) is Fate.RUN_ELSEWHERE


def test_a_lease_is_abandoned_when_it_expired_and_nobody_here_holds_it():
    job = a_job(lease_token="t", lease_expires=NOW)

    assert is_abandoned(job, frozenset(), NOW)
    assert not is_abandoned(job, frozenset({"t"}), NOW)
    assert not is_abandoned(job, frozenset(), NOW - 1)

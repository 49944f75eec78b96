"""The two transition tables: what they promise, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.wire.jobs import (
    JOB_FINAL,
    JOB_TRANSITIONS,
    RUN_FINAL,
    RUN_TRANSITIONS,
    IllegalTransition,
    JobStatus,
    RunStatus,
    advance,
)


def test_every_status_is_in_its_table_and_every_final_one_is_a_dead_end() -> None:
    assert set(RUN_TRANSITIONS) == set(RunStatus)
    assert set(JOB_TRANSITIONS) == set(JobStatus)
    assert {RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED} == RUN_FINAL
    assert {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED} == JOB_FINAL


@pytest.mark.parametrize("status", [s for s in RunStatus if s not in RUN_FINAL])
def test_a_run_can_be_cancelled_and_can_fail_from_everywhere_before_its_end(status: RunStatus) -> None:
    assert advance(RUN_TRANSITIONS, status, RunStatus.CANCELLED) is RunStatus.CANCELLED
    assert advance(RUN_TRANSITIONS, status, RunStatus.FAILED) is RunStatus.FAILED


@given(st.lists(st.sampled_from(JobStatus), max_size=30))
def test_a_job_ends_at_most_once_whatever_is_asked(wanted: list[JobStatus]) -> None:
    status, ends = JobStatus.QUEUED, 0
    for step in wanted:
        try:
            status = advance(JOB_TRANSITIONS, status, step)
        except IllegalTransition:
            continue
        ends += status in JOB_FINAL

    assert ends <= 1

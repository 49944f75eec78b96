"""What a job goes through, as data: two tables, one for the worker's pipeline, one for durable jobs.

`advance` is the only way to a new status; tests walk the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class RunStatus(StrEnum):
    """A job inside one worker. The values are the documents' and the known wrapper's words."""

    QUEUED = "queued"
    PROCESSING = "processing"  # inputs are fetched, the graph is checked and built
    GENERATING = "generating"  # the engine has it
    GENERATED = "generated"  # the engine is done; outputs are being stored
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


RUN_TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset({RunStatus.PROCESSING, RunStatus.FAILED, RunStatus.CANCELLED}),
    # Back to QUEUED: the engine was lost, or this process restarted before the engine had the prompt.
    RunStatus.PROCESSING: frozenset({RunStatus.GENERATING, RunStatus.QUEUED, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.GENERATING: frozenset({RunStatus.GENERATED, RunStatus.QUEUED, RunStatus.FAILED, RunStatus.CANCELLED}),
    # Back to QUEUED: a cached repeat whose files are gone must be made again.
    RunStatus.GENERATED: frozenset({RunStatus.COMPLETED, RunStatus.QUEUED, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.COMPLETED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.CANCELLED: frozenset(),
}


class JobStatus(StrEnum):
    """A durable job in the control plane (`/v1/jobs`)."""

    QUEUED = "queued"
    LEASED = "leased"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


JOB_TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.LEASED, JobStatus.FAILED, JobStatus.CANCELLED}),
    # A lost lease requeues the job instead of failing it: the worker died, the job did not.
    JobStatus.LEASED: frozenset(
        {JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.RUNNING: frozenset({JobStatus.COMPLETED, JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}

RUN_FINAL = frozenset(status for status, onward in RUN_TRANSITIONS.items() if not onward)
JOB_FINAL = frozenset(status for status, onward in JOB_TRANSITIONS.items() if not onward)

Status = TypeVar("Status", RunStatus, JobStatus)


class IllegalTransition(Exception):
    """A bug: somebody asked for a step that the table does not have."""


def advance(table: Mapping[Status, frozenset[Status]], current: Status, wanted: Status) -> Status:
    """`wanted`, if the table allows the step from `current`; else IllegalTransition."""
    if wanted not in table[current]:
        raise IllegalTransition(f"{current} -> {wanted}")
    return wanted

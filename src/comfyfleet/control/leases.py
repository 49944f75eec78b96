"""The rules of a lease, as pure functions of values and `now`. Who keeps them: `job_run` and `held_leases`.

A worker's lease is renewed for as long as the worker answers. What follows when it does not is decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum

import msgspec

from comfyfleet.control.jobs import POISON_AFTER_LOSSES, Job
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import ACTIVE, WorkerState
from comfyfleet.wire.jobs import JobStatus

LEASE_S = 30.0
RENEW_EVERY_S = 10.0
# How long a worker may be out of reach before its job is given to another: longer than a worker's own restart, which
# finds the job in its journal and goes on with it.
LOST_AFTER_S = 20.0
# A job given back by a busy worker comes again after this long, unless the worker said otherwise.
GIVEN_BACK_S = 1.0

_GONE = frozenset({WorkerState.DESTROYING, WorkerState.STOPPED, WorkerState.STOPPING, WorkerState.ERROR})


class Fate(StrEnum):
    """What to do about a job whose worker does not answer."""

    WAIT = "wait"
    RUN_ELSEWHERE = "run_elsewhere"
    POISON = "poison"


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """since: when the worker first did not answer about this job, and has not answered since."""

    since: float
    lost_after_s: float = LOST_AFTER_S


def fate(job: Job, worker: Worker | None, silence: Silence, now: float) -> Fate:
    """A worker that is gone for good need not be waited for; one that may come back has its time."""
    is_gone = worker is None or (worker.state in _GONE and not worker.is_foreign)
    if not is_gone and now - silence.since < silence.lost_after_s:
        return Fate.WAIT
    # A restarted control plane knows its workers from the store; one it does not know is gone.
    if job.losses + 1 >= POISON_AFTER_LOSSES:
        return Fate.POISON
    return Fate.RUN_ELSEWHERE


def avoided(lost_on: frozenset[int], workers: Iterable[Worker]) -> frozenset[int]:
    """The workers of its endpoint that a job is to be kept from: those that lost it, as long as there is another.

    Where there is none, ready or on its way, one of them has the job again; what kills every worker is poison anyway.
    """
    has_other = any(one.id not in lost_on and one.state in ACTIVE and not one.intent for one in workers)
    return lost_on if has_other else frozenset()


def is_left_behind(job: Job | None, worker_id: int) -> bool:
    """The worker that lost this job is to drop it: it is no more that worker's, and will not be in a moment.

    job: as the store has it now. While it waits, that worker may be the one that gets it; told to drop it then, it
    would end the run that is to come.
    """
    return job is not None and job.status is not JobStatus.QUEUED and job.worker_id != worker_id


def is_abandoned(job: Job, held: Collection[str], now: float) -> bool:
    """Leased, expired, and its token is none of those that we hold: its control plane died."""
    return job.lease_token not in held and (job.lease_expires or 0.0) <= now

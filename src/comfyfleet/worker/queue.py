"""The waiting line and what can be said about it: who is next, who waits where, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.job import Job

# What to tell when nothing was measured yet.
UNKNOWN_WAIT_S = 5.0


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """The line as one answer. position: 1 is next. Estimates in seconds, None while nothing was measured."""

    waiting: int
    generating: int
    storing: int
    limit: int
    next_place_s: float
    wait_s: float | None
    position: int | None = None
    eta_s: float | None = None


class WaitingLine:
    """Jobs that no engine has yet, in order of acceptance; some of the first have begun (their inputs are fetched)."""

    def __init__(self) -> None:
        self._jobs: dict[Job, bool] = {}  # job -> has begun

    @property
    def jobs(self) -> Sequence[Job]:
        return list(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs[job] = False

    def remove(self, job: Job) -> None:
        self._jobs.pop(job, None)

    def take(self, job: Job) -> bool:
        """Remove a job that has not begun; False for any other."""
        if self._jobs.get(job) is False:
            del self._jobs[job]
            return True
        return False

    def next_to_start(self, ahead: int) -> Job | None:
        """The next job to begin, if fewer than `ahead` have; it is marked as begun."""
        begun = 0
        for job, has_begun in self._jobs.items():
            begun += has_begun
            if begun >= ahead:
                return None
            if not has_begun:
                self._jobs[job] = True
                return job
        return None


def estimate(
    waiting: Sequence[Job],
    live: Iterable[Job],
    *,
    engines: Sequence[float],
    predicted_s: Callable[[Job], float | None],
    job: Job | None,
    limit: int,
) -> QueueView:
    """Play the line forward: each waiting job goes to the engine that frees first. engines: seconds of work in each."""
    free_at = sorted(engines) or [UNKNOWN_WAIT_S]
    first_free_s = free_at[0]
    known = False
    position: int | None = None
    eta_s: float | None = None
    next_place_s = first_free_s
    for index, one in enumerate(waiting):
        seconds = predicted_s(one)
        known = known or seconds is not None
        start = free_at[0]
        if index == 0:
            next_place_s = start
        free_at[0] = start + (seconds if seconds is not None else UNKNOWN_WAIT_S)
        free_at.sort()
        if one is job:
            position, eta_s = index + 1, start + (seconds or UNKNOWN_WAIT_S) if known else None
    statuses = [one.status for one in live]
    return QueueView(
        waiting=len(waiting),
        generating=statuses.count(RunStatus.GENERATING),
        storing=statuses.count(RunStatus.GENERATED),
        limit=limit,
        next_place_s=max(1.0, next_place_s),
        wait_s=round(free_at[0], 1) if known or not waiting else None,
        position=position,
        eta_s=None if eta_s is None else round(eta_s, 1),
    )

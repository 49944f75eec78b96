"""When a live job must end from outside: its deadline, its longest wait, its caller gone. Pure."""

from __future__ import annotations

from collections.abc import Callable

from comfyfleet.wire.errors import FleetError, JobCancelled, Unavailable, Unprocessable
from comfyfleet.worker.job import Job

_UNKNOWN_WAIT_S = 5.0


class QueueWaitExceeded(Unavailable):
    """The job waited longer than its max_queue_wait_s."""

    code = "queue_wait_exceeded"


class DeadlineExceeded(Unprocessable):
    """The job did not end within its deadline_s and was stopped."""

    code = "deadline_exceeded"


def reason_to_stop(
    job: Job, now: float, ticks: float, *, grace_s: float, eta_s: Callable[[Job], float | None]
) -> FleetError | None:
    """now: epoch s; ticks: monotonic s. A dropped caller may come back within `grace_s`: a repeat joins the job."""
    deadline, queue_deadline = job.deadline_at(), job.queue_deadline_at()
    if deadline is not None and now >= deadline:
        return DeadlineExceeded(f"not done within {job.request.deadline_s:g} s", deadline_s=job.request.deadline_s)
    if queue_deadline is not None and now >= queue_deadline:
        wait_s = eta_s(job)
        return QueueWaitExceeded(retry_after_s=_UNKNOWN_WAIT_S if wait_s is None else wait_s)
    has_left = job.abandonable and job.callers == 0 and job.left_at is not None
    if has_left and job.left_at is not None and ticks - job.left_at >= grace_s:
        return JobCancelled("Cancelled: its caller hung up and did not come back.")
    return None

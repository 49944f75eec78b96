"""What is wrong with a worker, from its reports, its silence and what the provider sees. Pure; "" is healthy.

A slow start is not a failure as long as the worker reports: provisioning may take an hour of downloads.
"""

from __future__ import annotations

from comfyfleet.control.fleet.base import FleetWorker, Presence
from comfyfleet.control.worker import LOST_AFTER_S, Worker
from comfyfleet.control.worker_states import ACTIVE, BOOTING, WorkerState

# A started process that has not reported once by then never will.
FIRST_REPORT_LIMIT_S = 120.0
# Even a worker that reports must become ready some time: later where there is much to download.
START_LIMIT_S = 2 * 3600.0
DOWNLOAD_S_PER_GB = 120.0
_HANDLED = (WorkerState.ERROR, WorkerState.STOPPING, WorkerState.STOPPED, WorkerState.DESTROYING, WorkerState.PENDING)


def ailment(
    worker: Worker, present: FleetWorker | None, *, has_provider: bool, now: float, download_gb: float = 0.0
) -> str:
    """Why this worker cannot go on as it is, or "". download_gb: what it may have to fetch first (`gpu_ram`)."""
    if worker.state in _HANDLED:
        return ""
    if has_provider and not worker.is_foreign:
        if present is None:
            return "the fleet provider does not know this worker any more"
        if present.presence is Presence.LOST:
            return f"its node is gone: {present.detail or 'no reason known'}"
        if present.presence is Presence.EXITED:
            return f"its process ended: {present.detail or 'no reason known'}"
        if present.presence is Presence.STOPPED and worker.state in ACTIVE:
            return "its process is not running"
    since_s = now - max(worker.last_report_at, worker.state_since if not worker.last_report_at else 0.0)
    if not worker.last_report_at:
        return f"no report within {FIRST_REPORT_LIMIT_S:.0f} s of its start" if since_s > FIRST_REPORT_LIMIT_S else ""
    if since_s > LOST_AFTER_S:
        return f"no report for {since_s:.0f} s"
    limit_s = max(START_LIMIT_S, download_gb * DOWNLOAD_S_PER_GB)
    if worker.state in BOOTING and worker.started_at and now - worker.started_at > limit_s:
        return f"not ready {limit_s / 3600:.0f} h after its start"
    return ""

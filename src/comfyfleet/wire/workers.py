"""What workers tell the control plane: `/worker_status/` and `/delete_requests/`.

Every field is optional but the id: bootstrap scripts send partial reports, old agents lack fields, new ones add some.
Sums (`new_load`, `cur_perf`, …) count since the last delivered report; divide by the time between received reports.
"""

from __future__ import annotations

from typing import Any

import msgspec


class WorkerStatusReport(msgspec.Struct, frozen=True, kw_only=True):
    """POST /worker_status/. Loads are in load units; max_perf is the score (load/s); disk in GB; loadtime in s."""

    id: int
    mtoken: str = ""
    version: str = ""
    url: str = ""
    loadtime: float = 0.0
    cur_load: float = 0.0
    new_load: float = 0.0
    rej_load: float = 0.0
    cur_perf: float = 0.0
    max_perf: float = 0.0
    error_msg: str = ""
    num_requests_working: int = 0
    num_requests_recieved: int = 0
    additional_disk_usage: float = 0.0
    disk_usage: float = 0.0
    working_request_idxs: tuple[int, ...] = ()
    cur_capacity: float = 0.0
    max_capacity: float = 0.0
    # Ours, from here on; a public worker sends none of it.
    incarnation: str = ""
    stage: str = ""  # provisioning | engine_start | engine_ready | benchmark | registered | ready
    stage_detail: str = ""  # "downloading 3 of 6, 41 %, 2 min left"
    stage_seconds: dict[str, float] = {}
    gpu_name: str = ""
    gpu: dict[str, Any] = {}
    warm_models: tuple[str, ...] | None = None  # in the engine's memory; None: it cannot say
    engine_version: str = ""
    draining: bool = False
    is_flagged: str = ""  # why this worker's score is doubted, or ""


class ReportTaken(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a status report. serve_for_s (ours): so long after sending it the worker may begin new work."""

    success: bool = True
    serve_for_s: float = 0.0


class FinishedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `/delete_requests/`: status is Success, Error, Rejected or Cancelled. Times: epoch s, 0 = never.

    The last three are ours. seconds: what the engine took, 0 where it did not say. shape: of the workflow. loaded: its
    models were not in memory when it began.
    """

    request_idx: int
    success: bool = True
    status: str = ""
    entered_queue_at: float = 0.0
    work_started_at: float = 0.0
    work_completed_at: float = 0.0
    seconds: float = 0.0
    shape: str = ""
    loaded: bool = False


class FinishedRequests(msgspec.Struct, frozen=True, kw_only=True):
    """POST /delete_requests/, in both of its forms: `requests` (1.9.1) or `request_idxs` + `success` (older)."""

    worker_id: int
    mtoken: str = ""
    requests: tuple[FinishedRequest, ...] = ()
    request_idxs: tuple[int, ...] = ()
    success: bool = True
    incarnation: str = ""  # ours

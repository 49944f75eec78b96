"""One worker as the control plane knows it: a frozen value, and the pure functions that turn reports into the next one.

Not its bookings (`load`) and not the registry (`workers`). What must outlive a restart of the control plane is the
value itself, less what its next report brings anyway.
"""

from __future__ import annotations

import msgspec

from comfyfleet.control.worker_states import ACTIVE, WorkerState, after_report, apply
from comfyfleet.wire.workers import WorkerStatusReport

# Reports come every 10 s at least; three missed ones take a worker out of routing.
SILENT_AFTER_S = 30.0
# And this long without a word from a worker that should talk is an error.
LOST_AFTER_S = 45.0
# Weight of the newest interval in the rolling load average.
_AVERAGE_WEIGHT = 0.3


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Load units per second, over the time between the last two received reports."""

    new_load: float = 0.0
    cur_perf: float = 0.0
    rej_load: float = 0.0


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """Times are epoch seconds (0: never). measured_perf: the benchmark's score. living_perf: corrected by real jobs.

    intent: what it drains for ("", "stop", "destroy", "update"); a worker with an intent gets no new request.
    """

    id: int
    endpoint_id: int
    group_id: int
    mtoken: str
    created_at: float
    state: WorkerState = WorkerState.CREATING
    state_since: float = 0.0
    intent: str = ""
    is_foreign: bool = False  # brought by hand: no provider can start or stop it
    generation: int = 0  # of its workergroup when it was last started
    url: str = ""
    incarnation: str = ""
    measured_perf: float = 0.0
    living_perf: float = 0.0
    loadtime: float = 0.0
    error_msg: str = ""
    started_at: float = 0.0
    loaded_at: float = 0.0
    last_report_at: float = 0.0
    idle_since: float = 0.0
    cur_load: float = 0.0
    cur_load_average: float = 0.0
    rates: Rates = Rates()
    disk_usage: float = 0.0
    warm_models: tuple[str, ...] | None = None  # None: it does not say
    gpu_name: str = ""
    version: str = ""
    stage: str = ""
    stage_detail: str = ""
    flag: str = ""  # why its score is doubted against its peers', or ""; routing gives it less
    own_flag: str = ""  # why the worker itself doubts its score, or ""; shown
    failures: int = 0  # starts in a row that did not end ready
    jobs_done: int = 0
    is_suspect: bool = False  # somebody could not reach it, and it has not reported since
    quarantined_until: float = 0.0
    quarantines: int = 0  # in a row
    price_hour: float = 0.0

    @property
    def perf(self) -> float:
        """The score that counts: the living one where there is one."""
        return self.living_perf or self.measured_perf


def to_state(worker: Worker, wanted: WorkerState, now: float) -> Worker:
    """The worker in another state, with the times that go with it."""
    if wanted is worker.state:
        return worker
    state = apply(worker.state, wanted)
    changes: dict[str, object] = {"state": state, "state_since": now}
    if state is WorkerState.IDLE:
        changes.update(loaded_at=now, idle_since=now, failures=0, error_msg="")
    elif state in (WorkerState.STARTING, WorkerState.REBOOTING, WorkerState.UPDATE_REBOOTING, WorkerState.LOADING):
        if worker.state not in ACTIVE:
            changes.update(started_at=now)
        changes.update(last_report_at=0.0, url="", stage="", stage_detail="")
    elif state is WorkerState.MODEL_LOADING and worker.state is WorkerState.IDLE:
        changes.update(started_at=now)  # it began again by itself
    elif state is WorkerState.ERROR:
        changes.update(failures=worker.failures + 1)
    elif state is WorkerState.STOPPED:
        changes.update(intent="", url="", cur_load=0.0, rates=Rates(), warm_models=None, last_report_at=0.0)
    return msgspec.structs.replace(worker, **changes)


def fold_report(worker: Worker, report: WorkerStatusReport, now: float) -> Worker:
    """The worker after one of its reports. Fields that a partial report lacks (zero, empty) keep what was known."""
    since_s = now - worker.last_report_at if worker.last_report_at else 0.0
    rates = (
        Rates(
            new_load=report.new_load / since_s,
            cur_perf=report.cur_perf / since_s,
            rej_load=report.rej_load / since_s,
        )
        if since_s > 0
        else worker.rates
    )
    is_idle = not report.cur_load and not report.num_requests_working
    folded = msgspec.structs.replace(
        worker,
        url=report.url or worker.url,
        incarnation=report.incarnation or worker.incarnation,
        measured_perf=report.max_perf or worker.measured_perf,
        living_perf=0.0 if report.max_perf and report.max_perf != worker.measured_perf else worker.living_perf,
        loadtime=report.loadtime,
        error_msg=report.error_msg,
        last_report_at=now,
        started_at=worker.started_at or now,
        idle_since=(worker.idle_since or now) if is_idle else 0.0,
        cur_load=report.cur_load,
        cur_load_average=worker.cur_load_average * (1 - _AVERAGE_WEIGHT) + report.cur_load * _AVERAGE_WEIGHT,
        rates=rates,
        disk_usage=report.disk_usage or worker.disk_usage,
        warm_models=worker.warm_models if report.warm_models is None else report.warm_models,
        gpu_name=report.gpu_name or worker.gpu_name,
        version=report.version or worker.version,
        stage=report.stage or worker.stage,
        stage_detail=report.stage_detail,
        own_flag=report.is_flagged,
        is_suspect=False,
    )
    return to_state(folded, after_report(worker.state, report), now)


def is_routable(worker: Worker, now: float) -> bool:
    """Ready, heard of lately, not draining, not in quarantine."""
    return (
        worker.state is WorkerState.IDLE
        and not worker.intent
        and not worker.is_suspect
        and bool(worker.url)
        and worker.measured_perf > 0
        and now - worker.last_report_at < SILENT_AFTER_S
        and now >= worker.quarantined_until
    )


def listed(worker: Worker, requests_working: int) -> dict[str, object]:
    """A row of `/get_endpoint_workers/`: no float is ever null. Before a score is known, `perf` is 0."""
    return {
        "id": worker.id,
        "status": str(worker.state),
        "cur_load": worker.cur_load,
        "new_load": worker.rates.new_load,
        "cur_load_rolling_avg": worker.cur_load_average,
        "cur_perf": worker.rates.cur_perf,
        "perf": worker.perf,
        "measured_perf": worker.measured_perf,
        "dlperf": 0.0,
        "reliability": 1.0,
        "reqs_working": requests_working,
        "disk_usage": worker.disk_usage,
        "loaded_at": worker.loaded_at,
        "started_at": worker.started_at,
        "gpu_name": worker.gpu_name,
        "stage": worker.stage,
        "stage_detail": worker.stage_detail,
        "error_msg": worker.error_msg,
        "flag": worker.flag or worker.own_flag,
        "warm_models": list(worker.warm_models or ()),
        "reason": "" if worker.state is WorkerState.IDLE else worker.error_msg or worker.stage_detail or worker.stage,
        "endpoint_id": worker.endpoint_id,
        "workergroup_id": worker.group_id,
        "url": worker.url,
    }

"""A worker's life, as one table. Names are the public engine's; outside, the words are Ready and Inactive.

`apply` is the only way to a new state. What a report means for the state is `after_report`; silence and failures are
`workers`' and the reconciler's business, which ask for a state here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from comfyfleet.wire.jobs import IllegalTransition
from comfyfleet.wire.workers import WorkerStatusReport


class WorkerState(StrEnum):
    """The API's state names are lower case."""

    PENDING = "pending"  # wanted; nothing exists yet
    CREATING = "creating"  # slot and folder
    CREATED = "created"  # exists, was never started
    LOADING = "loading"  # provisioning
    MODEL_LOADING = "model_loading"  # engine start and benchmark
    IDLE = "idle"  # Ready: can serve, busy or not
    STOPPING = "stopping"
    STOPPED = "stopped"  # Inactive: folder, id and score kept
    STARTING = "starting"  # a later start
    ERROR = "error"
    REBOOTING = "rebooting"
    UPDATE_READY = "update_ready"  # drained for an update
    UPDATE_REBOOTING = "update_rebooting"
    UPDATE_STARTING = "update_starting"
    DESTROYING = "destroying"


S = WorkerState

WORKER_TRANSITIONS: Mapping[WorkerState, frozenset[WorkerState]] = {
    S.PENDING: frozenset({S.CREATING, S.ERROR, S.DESTROYING}),
    # IDLE: a control plane that restarted hears first from a worker that became ready meanwhile.
    S.CREATING: frozenset({S.CREATED, S.LOADING, S.MODEL_LOADING, S.IDLE, S.ERROR, S.DESTROYING}),
    S.CREATED: frozenset({S.LOADING, S.DESTROYING}),
    S.LOADING: frozenset({S.MODEL_LOADING, S.IDLE, S.STOPPING, S.ERROR, S.DESTROYING}),
    S.MODEL_LOADING: frozenset({S.LOADING, S.IDLE, S.STOPPING, S.ERROR, S.DESTROYING}),
    S.IDLE: frozenset({S.STOPPING, S.ERROR, S.REBOOTING, S.UPDATE_READY, S.MODEL_LOADING, S.DESTROYING}),
    # STARTING: needed again before the stop was done.
    S.STOPPING: frozenset({S.STOPPED, S.STARTING, S.ERROR, S.DESTROYING}),
    S.STOPPED: frozenset({S.STARTING, S.UPDATE_STARTING, S.ERROR, S.DESTROYING}),
    S.STARTING: frozenset({S.IDLE, S.STOPPING, S.ERROR, S.DESTROYING}),
    # IDLE: our own agent can recover (its error text goes away); the public one cannot and is restarted.
    S.ERROR: frozenset({S.REBOOTING, S.IDLE, S.DESTROYING}),
    S.REBOOTING: frozenset({S.LOADING, S.MODEL_LOADING, S.STARTING, S.IDLE, S.ERROR, S.DESTROYING}),
    S.UPDATE_READY: frozenset({S.UPDATE_REBOOTING, S.IDLE, S.ERROR, S.DESTROYING}),
    S.UPDATE_REBOOTING: frozenset({S.UPDATE_STARTING, S.IDLE, S.ERROR, S.DESTROYING}),
    S.UPDATE_STARTING: frozenset({S.IDLE, S.STOPPING, S.ERROR, S.DESTROYING}),
    S.DESTROYING: frozenset(),
}

# A process is running, or is on its way: these cost GPU time.
ACTIVE = frozenset(
    {S.CREATING, S.LOADING, S.MODEL_LOADING, S.IDLE, S.STARTING, S.REBOOTING}
    | {S.UPDATE_READY, S.UPDATE_REBOOTING, S.UPDATE_STARTING}
)
BOOTING = ACTIVE - {S.IDLE, S.UPDATE_READY}
INACTIVE = frozenset({S.CREATED, S.STOPPED, S.STOPPING})
# A report that says "ready" makes these IDLE.
AWAITING_READY = BOOTING | {S.ERROR}


def apply(current: WorkerState, wanted: WorkerState) -> WorkerState:
    """`wanted`, if the table allows the step; the same state is no step. Raises IllegalTransition: a bug."""
    if wanted is current:
        return current
    if wanted not in WORKER_TRANSITIONS[current]:
        raise IllegalTransition(f"worker: {current} -> {wanted}")
    return wanted


def is_ready(report: WorkerStatusReport) -> bool:
    """Loaded, with a score, and without an error. A zero score is not ready, whatever `loadtime` says."""
    return report.loadtime > 0 and report.max_perf > 0 and not report.error_msg


def after_report(current: WorkerState, report: WorkerStatusReport) -> WorkerState:
    """The state a worker is in once it has reported this. Never a step that the table lacks."""
    if current in (S.DESTROYING, S.STOPPING, S.STOPPED, S.PENDING, S.CREATED):
        return current  # a last word of something that is going away
    if report.error_msg:
        return apply(current, S.ERROR)
    if is_ready(report):
        return apply(current, S.IDLE) if current in AWAITING_READY else current
    if current in (S.CREATING, S.LOADING, S.REBOOTING, S.MODEL_LOADING):
        is_provisioning = report.stage == "provisioning"
        return apply(current, S.LOADING if is_provisioning else S.MODEL_LOADING)
    if current is S.IDLE:
        return apply(current, S.MODEL_LOADING)  # it restarted by itself and is not loaded any more
    if current is S.UPDATE_REBOOTING:
        return apply(current, S.UPDATE_STARTING)
    return current

"""Why a request waits at an endpoint, and what comes next, in one sentence for its caller. Pure.

A crash loop is never called capacity, and missing capacity never a crash loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from comfyfleet.control.breaker import start_refusal
from comfyfleet.control.scaling import Action, ScalingInputs, Verb, WorkerFacts
from comfyfleet.control.worker_states import BOOTING, WorkerState

_STAGES = {
    "provisioning": "getting its models and packages",
    "engine_start": "starting its engine",
    "engine_ready": "its engine is up",
    "benchmark": "running its benchmark",
    "registered": "about to serve",
}
_BY_STATE = {
    WorkerState.CREATING: "being created",
    WorkerState.LOADING: "getting its models and packages",
    WorkerState.MODEL_LOADING: "starting its engine and running its benchmark",
    WorkerState.STARTING: "waking up",
    WorkerState.REBOOTING: "restarting after a failure",
    WorkerState.UPDATE_REBOOTING: "restarting for an update",
    WorkerState.UPDATE_STARTING: "starting after an update",
}


def waiting_reason(inputs: ScalingInputs, actions: Sequence[Action]) -> str:
    """The first that is true of: the endpoint's state, workers that are busy or coming, what forbids more."""
    if inputs.policy.state != "active":
        return f"the endpoint is {inputs.policy.state}; set endpoint_state to active to serve again"
    booting = [worker for worker in inputs.workers if worker.state in BOOTING and worker.intent != "destroy"]
    ready = [worker for worker in inputs.workers if worker.state is WorkerState.IDLE and not worker.intent]
    if ready:
        text = f"all {len(ready)} ready workers have a full queue" if len(ready) > 1 else "the one ready worker is busy"
        return f"{text}; requests go on in order of arrival{_and_more(inputs, booting)}"
    if booting:
        return f"{_describe(booting[0])}{_others(len(booting) - 1)}; the request goes there as soon as it is ready"
    if any(action.verb in (Verb.CREATE, Verb.WAKE, Verb.KEEP, Verb.REBOOT) for action in actions):
        return "a worker is being started; the request goes there as soon as it is ready"
    if refusal := start_refusal(inputs):
        return refusal
    if not any(not group.is_deleted for group in inputs.groups) and not inputs.workers:
        return "the endpoint has no workergroup, so no worker can be started; create one"
    if inputs.policy.max_workers <= 0:
        return "max_workers is 0, so no worker may be started"
    failed = [worker for worker in inputs.workers if worker.state is WorkerState.ERROR]
    if failed:
        return f"worker {failed[0].id} failed ({failed[0].error or 'no reason given'}) and is restarted in a moment"
    if len(inputs.workers) >= inputs.policy.max_workers:
        return f"max_workers ({inputs.policy.max_workers}) is reached; the request waits for a worker to be ready again"
    return "a worker is started within a second"


def _describe(worker: WorkerFacts) -> str:
    doing = _STAGES.get(worker.stage) or _BY_STATE.get(worker.state, "starting")
    return f"worker {worker.id} is {doing}" if not doing.startswith("its") else f"worker {worker.id}: {doing}"


def _others(count: int) -> str:
    return f" ({count} more {'is' if count == 1 else 'are'} starting)" if count > 0 else ""


def _and_more(inputs: ScalingInputs, booting: Sequence[WorkerFacts]) -> str:
    if booting:
        return f", and {_describe(booting[0])}"
    if refusal := start_refusal(inputs):
        return f"; {refusal}"
    if len(inputs.workers) >= inputs.policy.max_workers:
        return f"; max_workers ({inputs.policy.max_workers}) is reached"
    return ""

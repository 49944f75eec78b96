"""Whose fault it was, and what to do about it. Pure: values in, a decision out.

Job: this job fails and no retry helps. Engine: the process is lost or sick; the job runs again elsewhere, once.
Worker: our own folders or memory. Platform: something outside (object store, network, disk). A worker's standing
must not suffer for the job's fault, nor for the platform's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class FaultClass(StrEnum):
    JOB = "job"
    WORKER = "worker"
    ENGINE = "engine"
    PLATFORM = "platform"


class FaultKind(StrEnum):
    NODE_ERROR = "node_error"
    OUT_OF_MEMORY = "out_of_memory"
    DEVICE = "device"  # the GPU context is poisoned: nothing runs on it until a new process
    INTERRUPTED = "interrupted"  # by somebody else: we did not ask for it
    ENGINE_LOST = "engine_lost"
    WORKER_THREAD_DEAD = "worker_thread_dead"
    DISK_FULL = "disk_full"
    OUTPUTS_GONE = "outputs_gone"
    STUCK = "stuck"  # at a cancelled prompt, in a node that hears no interrupt


CLASS_OF: dict[FaultKind, FaultClass] = {
    FaultKind.NODE_ERROR: FaultClass.JOB,
    FaultKind.OUT_OF_MEMORY: FaultClass.JOB,
    FaultKind.DEVICE: FaultClass.ENGINE,
    FaultKind.INTERRUPTED: FaultClass.ENGINE,
    FaultKind.ENGINE_LOST: FaultClass.ENGINE,
    FaultKind.WORKER_THREAD_DEAD: FaultClass.ENGINE,
    FaultKind.DISK_FULL: FaultClass.WORKER,
    FaultKind.OUTPUTS_GONE: FaultClass.ENGINE,
    FaultKind.STUCK: FaultClass.ENGINE,
}


class Remedy(StrEnum):
    """What happens next."""

    FAIL = "fail"
    RETRY = "retry"
    FREE_AND_RETRY = "free_and_retry"
    RESTART_AND_RETRY = "restart_and_retry"
    RESTART_AND_FAIL = "restart_and_fail"


# Runs of a job that may end badly before the job itself does: once more, elsewhere. A process that vanished may have
# been anybody's doing, so a job is blamed for it only after three.
_RETRIES = 1
_RETRIES_WHEN_LOST = 3
_DEVICE = re.compile(
    r"device-side assert|CUDA error|cuda runtime error|CUBLAS_STATUS|CUDNN_STATUS|illegal memory access|"
    r"misaligned address|unspecified launch failure|Xid|ECC error|device is lost|hipError",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"out of memory|allocation on device|can't allocate memory|not enough memory", re.IGNORECASE)
_PATH = re.compile(r"(?:(?<=[\s\"'(\[=:,])|^)(?:/[^\s\"'()\[\]:,/]+){2,}/?|\b[A-Za-z]:\\[^\s\"']+")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that went wrong with a run. `message` and `details` are fit for a client: no server path in them."""

    kind: FaultKind
    message: str
    details: dict[str, Any]

    @property
    def fault_class(self) -> FaultClass:
        return CLASS_OF[self.kind]


def kind_of_node_error(exception_type: str, message: str) -> FaultKind:
    """Out of memory, a poisoned device, or simply the node's own error."""
    if "OutOfMemory" in exception_type or _MEMORY.search(message):
        return FaultKind.OUT_OF_MEMORY
    if "AcceleratorError" in exception_type or _DEVICE.search(message):
        return FaultKind.DEVICE
    if "No space left on device" in message:
        return FaultKind.DISK_FULL
    return FaultKind.NODE_ERROR


def remedy_for(kind: FaultKind, earlier: tuple[FaultKind, ...]) -> Remedy:
    """The remedy for a run that ended with `kind`, when this job's earlier runs ended with `earlier`."""
    may_retry = len(earlier) < (_RETRIES_WHEN_LOST if kind is FaultKind.ENGINE_LOST else _RETRIES)
    match kind:
        case FaultKind.NODE_ERROR | FaultKind.DISK_FULL:
            return Remedy.FAIL
        case FaultKind.OUT_OF_MEMORY:
            return Remedy.FREE_AND_RETRY if may_retry else Remedy.FAIL
        case FaultKind.DEVICE | FaultKind.WORKER_THREAD_DEAD:
            return Remedy.RESTART_AND_RETRY if may_retry else Remedy.RESTART_AND_FAIL
        case FaultKind.INTERRUPTED | FaultKind.ENGINE_LOST | FaultKind.OUTPUTS_GONE | FaultKind.STUCK:
            return Remedy.RETRY if may_retry else Remedy.FAIL


def from_error_message(data: dict[str, Any]) -> Fault:
    """The fault in a history's `execution_error` message: ComfyUI's facts, without tracebacks and server paths."""
    message = without_paths(str(data.get("exception_message", "")).strip())
    exception_type = str(data.get("exception_type", ""))
    node_id, class_type = str(data.get("node_id", "")), str(data.get("node_type", ""))
    return Fault(
        kind=kind_of_node_error(exception_type, message),
        message=f"node {node_id} ({class_type}): {message or exception_type}",
        details={
            "node_id": node_id,
            "class_type": class_type,
            "exception_type": exception_type,
            "exception_message": message,
            "executed": data.get("executed", []),
        },
    )


def without_paths(text: str) -> str:
    """`text` with absolute paths cut down to their last part."""
    return _PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/"))[-1], text)

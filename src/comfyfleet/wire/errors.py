"""The one error tree: code, HTTP status and retryability stand on the class.

FleetError
├── BadRequest 400 · Malformed body, wrong shape
│   └── InvalidArguments · the shape is right, a value is not
├── Unauthorized 401 · no or a wrong key or ticket
├── Forbidden 403 · a good key without the right
├── NotFound 404
├── Gone 409 · the thing joined went away
├── Fenced 410 · this life of the worker is over
├── SessionGone 410
├── Misdirected 421 · between replicas: ask the endpoint's owner
├── PayloadTooLarge 413
├── Unprocessable 422 · no retry can help
│   ├── WorkflowRefused · a graph that cannot run, naming node and input
│   ├── ModelFileUnusable · a truncated model file, a pickle, or another family
│   ├── InputRefused · a file, address or URL that we do not take
│   ├── InputUnavailable · a file that its host did not give us
│   ├── IdempotencyMismatch · the same id with another body
│   ├── ProvisionFailed · a model, package or script that a worker needs could not be had
│   └── JobFailed · the job ran and failed by its own fault
├── TooManyRequests 429
├── JobCancelled 499
├── Unavailable 503 · a retry can help; carries retry_after_s
│   ├── QueueFull · EngineUnavailable · NoWorker · ShuttingDown
└── DiskFull 507

Raise with facts (`node_id="7", input="seed"`); the renderers in `web` turn an error into the body of its side: the
worker's result shape or the control plane's `{error, msg, details}`. A bug is not a FleetError: it becomes a 500.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class FleetError(Exception):
    """Base of all errors we mean to show. `details` holds facts a program can read; never a secret or a server path."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, retry_after_s: float | None = None, **details: Any) -> None:
        self.message = message or (type(self).__doc__ or self.code).strip().splitlines()[0]
        self.retry_after_s = retry_after_s
        self.details: dict[str, Any] = {name: value for name, value in details.items() if value is not None}
        super().__init__(self.message)

    def as_dict(self) -> dict[str, Any]:
        """`{code, message, details}`, the body's `error`."""
        return {"code": self.code, "message": self.message, "details": self.details}


class BadRequest(FleetError):
    """The body is not JSON, or not of the shape asked for."""

    code, status = "bad_request", 400


class InvalidArguments(BadRequest):
    """A management call with a value that cannot be; details name the field."""

    code = "invalid_args"


class Unauthorized(FleetError):
    """A key or ticket is needed, and this one is missing, wrong, used or expired."""

    code, status = "unauthorized", 401


class Forbidden(FleetError):
    """This key may not do that."""

    code, status = "forbidden", 403


class NotFound(FleetError):
    """There is no such thing, or it is not yours to see."""

    code, status = "not_found", 404


class Gone(FleetError):
    """What this request joined went away before it ended."""

    code, status = "gone", 409


class Fenced(FleetError):
    """This life of the worker is over: another has taken its name. It must end itself."""

    code, status = "fenced", 410


class Misdirected(FleetError):
    """Another control plane owns the endpoint. Replicas say this to each other; no caller sees it."""

    code, status, retryable = "misdirected", 421, True


class SessionGone(FleetError):
    """The session ended or expired."""

    code, status = "session_gone", 410


class PayloadTooLarge(FleetError):
    """The body is over the limit."""

    code, status = "payload_too_large", 413


class Unprocessable(FleetError):
    """Understood, and no retry can help."""

    code, status = "unprocessable", 422


class WorkflowRefused(Unprocessable):
    """The workflow cannot run as it is; details name node_id, class_type and input."""

    code = "workflow_refused"


class ModelFileUnusable(Unprocessable):
    """A model file is truncated, a pickle, of another family, or lacks tensors; details name file and tensor."""

    code = "model_file_unusable"


class InputRefused(Unprocessable):
    """We do not take this file or go to this address; details name reason, and node_id and input where known."""

    code = "input_refused"


class InputUnavailable(Unprocessable):
    """The host of an input file did not give it to us: missing, failing, too slow."""

    code = "input_unavailable"


class IdempotencyMismatch(Unprocessable):
    """This id was used before with another body."""

    code = "idempotency_mismatch"


class ProvisionFailed(Unprocessable):
    """Something a worker needs on disk could not be had; details name file, source and reason."""

    code = "provision_failed"


class JobFailed(Unprocessable):
    """The job ran and failed by its own fault."""

    code = "job_failed"


class TooManyRequests(FleetError):
    """Over a rate limit or quota; try again after retry_after_s."""

    code, status, retryable = "too_many_requests", 429, True


class JobCancelled(FleetError):
    """The job was cancelled."""

    code, status = "cancelled", 499


class Unavailable(FleetError):
    """Not now; a retry after retry_after_s can help."""

    code, status, retryable = "unavailable", 503, True


class QueueFull(Unavailable):
    """The queue is full; retry_after_s is the true estimate of when a place is free."""

    code = "queue_full"


class EngineUnavailable(Unavailable):
    """The engine is starting, restarting or lost."""

    code = "engine_unavailable"


class NoWorker(Unavailable):
    """No worker can take this now."""

    code = "no_worker"


class ShuttingDown(Unavailable):
    """This process is draining."""

    code = "shutting_down"


class DiskFull(FleetError):
    """No room for files; jobs are refused until there is."""

    code, status = "disk_full", 507


@contextmanager
def room_on_disk() -> Iterator[None]:
    """Around writing files: a full disk or quota comes out as DiskFull, every other OSError as it is."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull from problem
        raise


def all_errors() -> list[type[FleetError]]:
    """Every class of the tree, parents first; documentation tests walk it."""
    found: list[type[FleetError]] = []
    waiting: list[type[FleetError]] = [FleetError]
    while waiting:
        current = waiting.pop(0)
        found.append(current)
        waiting.extend(current.__subclasses__())
    return found

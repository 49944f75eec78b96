"""One request as its caller watches it: status, progress, result."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypedDict

from comfyfleet.client.transport import Answer


class RequestState(StrEnum):
    """The words of the known client."""

    NEW = "New"
    QUEUED = "Queued"
    POLLING = "Polling"
    IN_PROGRESS = "In Progress"
    RETRYING = "Retrying"
    COMPLETE = "Complete"
    ERRORED = "Errored"
    CANCELLED = "Cancelled"


class RequestOutcome(TypedDict):
    """What `endpoint.request` returns. `response` is the worker's body: parsed JSON, text, bytes, or a stream."""

    response: Any
    ok: bool
    status: int
    text: str
    content_type: str | None
    latency: float
    url: str
    request_idx: int
    auth_data: dict[str, Any]


def outcome_of(answer: Answer, auth_data: dict[str, Any], *, request_idx: int, latency: float) -> RequestOutcome:
    """A worker's answer as its caller gets it."""
    return RequestOutcome(
        response=answer.body if answer.status < 400 or isinstance(answer.body, dict) else {"error": answer.text},
        ok=answer.status // 100 == 2,
        status=answer.status,
        text=answer.text,
        content_type=answer.content_type,
        latency=latency,
        url=str(auth_data.get("url", "")),
        request_idx=request_idx,
        auth_data=auth_data,
    )


@dataclass(kw_only=True)
class ServerlessRequest:
    """Pass one to `endpoint.request` and read it from another task. Times are epoch seconds.

    waiting_for: why there is no worker yet, in the control plane's words. progress: the worker's last snapshot
    ({percentage, message, …}), empty before the first.
    """

    status: RequestState = RequestState.NEW
    create_time: float | None = None
    start_time: float | None = None
    complete_time: float | None = None
    request_idx: int = 0
    waiting_for: str = ""
    progress: dict[str, Any] = field(default_factory=dict)

"""`/route/` and what follows it: the shapes the real clients send and read, field for field.

Source: the public client and worker framework, `vastai` 1.9.1 (names are theirs, `num_requests_recieved` included).
"""

from __future__ import annotations

from typing import Any

import msgspec


class RouteHint(msgspec.Struct, frozen=True, kw_only=True):
    """Ours, optional: what the router may know of the work. models: file names; shape: a workflow shape digest."""

    models: tuple[str, ...] = ()
    shape: str = ""


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /route/. request_idx 0 is a new request; cost is load units, 100 a job unless said otherwise."""

    endpoint: str
    api_key: str = ""
    cost: float = 100.0
    request_idx: int = 0
    replay_timeout: float = 60.0
    hint: RouteHint | None = None
    idempotency_key: str = ""


class RouteReady(msgspec.Struct, frozen=True, kw_only=True):
    """A worker was chosen. The six fields before `ticket` are all demanded by the public worker framework.

    The client hands the whole answer to the worker as `auth_data`.
    """

    endpoint: str
    url: str
    cost: float
    reqnum: int
    request_idx: int
    signature: str
    ticket: str
    request_id: str = msgspec.field(name="__request_id")


class RouteWaiting(msgspec.Struct, frozen=True, kw_only=True):
    """No worker yet: no `url` key at all, which is how clients tell. `reason` is ours: why, and what comes next."""

    endpoint: str
    status: str
    request_idx: int
    reason: str
    request_id: str = msgspec.field(name="__request_id")


class WorkerCall(msgspec.Struct, frozen=True, kw_only=True):
    """What a client posts to a worker's handler route."""

    auth_data: dict[str, Any]
    payload: dict[str, Any]
    session_id: str | None = None

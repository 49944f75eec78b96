"""What an operator looks at: workers, logs, scaling decisions, health, metrics."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from comfyfleet.control.api.calling import Caller, add, query_number
from comfyfleet.control.auth import READ
from comfyfleet.control.condition import Condition
from comfyfleet.control.logbook import Logbook
from comfyfleet.control.management import Management
from comfyfleet.control.metrics import Metrics
from comfyfleet.control.store.base import Store
from comfyfleet.control.workers import Workers
from comfyfleet.version import __version__
from comfyfleet.web import JsonResponse, whole_number
from comfyfleet.wire.errors import InvalidArguments, NotFound

MAX_TAIL = 10_000
MAX_DECISIONS = 1000


class WorkersBody(msgspec.Struct, kw_only=True):
    """POST /get_endpoint_workers/: by id, or by name."""

    id: int | None = None
    endpoint: str = ""


class LogsBody(msgspec.Struct, kw_only=True):
    """POST /get_endpoint_logs/ and /get_autogroup_logs/: by id, or by the endpoint's name."""

    id: int | None = None
    endpoint: str = ""
    tail: int | None = None


def router(
    *,
    management: Management,
    workers: Workers,
    logbook: Logbook,
    store: Store,
    metrics: Metrics,
    caller: Caller,
    condition: Callable[[], Condition],
) -> APIRouter:
    """The routes. condition: what `/health` says."""
    routes = APIRouter(tags=["insight"])

    async def get_endpoint_workers(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, WorkersBody)
        try:
            endpoint = management.endpoint_by(principal, body.id, body.endpoint)
        except NotFound:
            # The real client takes any other dict for a failure of its own; this one it turns into an empty list.
            return JsonResponse({"error_msg": "no such endpoint"})
        return JsonResponse(workers.listing(endpoint.id))

    async def list_workers(request: Request) -> JsonResponse:
        principal = await caller.principal(request)
        rows = [row for endpoint in management.endpoints(principal) for row in workers.listing(endpoint.id)]
        return JsonResponse({"workers": rows})

    def tail_of(body: LogsBody) -> int:
        tail = 1000 if body.tail is None else body.tail
        if not 0 <= tail <= MAX_TAIL:
            raise InvalidArguments(f"tail must be from 0 to {MAX_TAIL}", field="tail")
        return tail

    async def get_endpoint_logs(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, LogsBody)
        endpoint = management.endpoint_by(principal, body.id, body.endpoint)
        return JsonResponse(await logbook.read(endpoint_id=endpoint.id, workergroup_id=None, tail=tail_of(body)))

    async def get_workergroup_logs(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, LogsBody)
        group = management.workergroup(principal, body.id or 0)
        return JsonResponse(await logbook.read(endpoint_id=None, workergroup_id=group.id, tail=tail_of(body)))

    async def list_decisions(request: Request, endpoint_id: int) -> JsonResponse:
        principal = await caller.principal(request)
        principal.demand(READ, endpoint_id)
        management.endpoint(principal, endpoint_id)
        limit = query_number(request, "limit", 100, lowest=1, highest=MAX_DECISIONS)
        before = request.query_params.get("before_id")
        before_id = whole_number(before) if before else None
        if before and before_id is None:
            raise InvalidArguments("before_id is a decision's id", field="before_id")
        rows = await store.decisions(endpoint_id, limit=limit, before_id=before_id)
        return JsonResponse(
            {
                "decisions": [
                    {
                        "id": row.id,
                        "at": row.at,
                        "sentence": row.sentence,
                        "inputs": msgspec.Raw(row.inputs.encode()),
                        "outcome": msgspec.Raw(row.outcome.encode()),
                    }
                    for row in rows
                ]
            }
        )

    async def health() -> JsonResponse:
        found = condition()
        about = {"version": __version__, "role": "control", **found.facts}
        if found.why_unfit:
            return JsonResponse({"status": "unavailable", "reason": found.why_unfit, **about}, status_code=503)
        return JsonResponse({"status": "ok", **about})

    async def show_metrics(request: Request) -> Response:
        (await caller.principal(request)).demand_account_wide(READ)
        return Response(await metrics.render(), media_type="text/plain; version=0.0.4")

    add(routes, ["POST"], ["/get_endpoint_workers/"], get_endpoint_workers, summary="Live workers", body=WorkersBody)
    add(routes, ["GET"], ["/v1/workers"], list_workers, summary="Every live worker this key may see")
    add(routes, ["POST"], ["/get_endpoint_logs/"], get_endpoint_logs, summary="An endpoint's log", body=LogsBody)
    add(
        routes,
        ["POST"],
        ["/get_workergroup_logs/", "/get_autogroup_logs/"],
        get_workergroup_logs,
        summary="A workergroup's log",
        body=LogsBody,
    )
    add(
        routes,
        ["GET"],
        ["/v1/endpoints/{endpoint_id}/decisions"],
        list_decisions,
        summary="Scaling decisions with their inputs, newest first",
    )
    add(routes, ["GET"], ["/health"], health, summary="200 while this process can serve, else 503 and why; no key")
    add(routes, ["GET"], ["/metrics"], show_metrics, summary="Prometheus metrics")
    return routes

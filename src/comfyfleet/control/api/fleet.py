"""What an operator asks about the machines: nodes, the workers on them, and what happened lately."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from comfyfleet.control.api.calling import Caller, add, query_number
from comfyfleet.control.auth import READ
from comfyfleet.control.fleet.base import FleetProvider, FleetWorker
from comfyfleet.control.worker import Worker
from comfyfleet.control.workers import Workers
from comfyfleet.web import JsonResponse

MAX_EVENTS = 1000


def router(*, provider: FleetProvider | None, workers: Workers, caller: Caller) -> APIRouter:
    """The routes. They are about machines, which belong to no endpoint: a key that is bound to some is refused."""
    routes = APIRouter(tags=["fleet"])

    async def list_nodes(request: Request) -> JsonResponse:
        (await caller.principal(request)).demand_account_wide(READ)
        nodes = list(await provider.nodes()) if provider is not None else []
        return JsonResponse({"nodes": nodes, "trouble": provider.trouble if provider is not None else ""})

    async def list_fleet_workers(request: Request) -> JsonResponse:
        (await caller.principal(request)).demand_account_wide(READ)
        present = {found.id: found for found in await provider.list()} if provider is not None else {}
        known = {worker.id: worker for worker in workers.all()}
        rows = [_row(number, known.get(number), present.get(number)) for number in sorted({*known, *present})]
        return JsonResponse({"workers": rows, "trouble": provider.trouble if provider is not None else ""})

    async def list_events(request: Request) -> JsonResponse:
        (await caller.principal(request)).demand_account_wide(READ)
        limit = query_number(request, "limit", 100, lowest=1, highest=MAX_EVENTS)
        events = provider.events() if provider is not None else ()
        return JsonResponse({"events": list(events[-limit:])})

    add(routes, ["GET"], ["/v1/fleet/nodes"], list_nodes, summary="Machines, and why nothing new starts if so")
    add(routes, ["GET"], ["/v1/fleet/workers"], list_fleet_workers, summary="Workers, by machine")
    add(routes, ["GET"], ["/v1/fleet/events"], list_events, summary="What happened to the fleet lately, oldest first")
    return routes


def _row(number: int, worker: Worker | None, found: FleetWorker | None) -> dict[str, object]:
    """presence: what the provider sees, "" for a worker that it does not have."""
    return {
        "id": number,
        "presence": str(found.presence) if found is not None else "",
        "status": str(worker.state) if worker is not None else "",
        "node": found.node if found is not None else "",
        "address": found.address if found is not None else "",
        "endpoint_id": worker.endpoint_id if worker is not None else 0,
        "workergroup_id": worker.group_id if worker is not None else 0,
        "incarnation": worker.incarnation if worker is not None else "",
        "url": worker.url if worker is not None else "",
        "gpu_name": (worker.gpu_name if worker is not None else "") or (found.gpu_name if found is not None else ""),
        "price_hour": found.price_hour if found is not None else 0.0,
        "started_at": found.started_at if found is not None else 0.0,
        "detail": (found.detail if found is not None else "") or (worker.error_msg if worker is not None else ""),
    }

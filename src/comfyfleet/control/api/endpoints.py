"""`/api/v0/endptjobs/`: endpoints, as the real clients list, make, change and delete them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request

from comfyfleet.control.api.calling import Caller, add, given
from comfyfleet.control.keys import Keyring
from comfyfleet.control.management import Management
from comfyfleet.control.records import Endpoint, EndpointState
from comfyfleet.control.workers import Workers
from comfyfleet.web import JsonResponse


class EndpointBody(msgspec.Struct, kw_only=True):
    """Fields that may be null or absent: at creation the default, at a change the present value. Others are ignored."""

    endpoint_name: str | None = None
    cold_workers: int | None = None
    min_workers: int | None = None  # the console's word for cold_workers
    max_workers: int | None = None
    min_load: float | None = None
    min_cold_load: float | None = None
    target_util: float | None = None
    cold_mult: float | None = None
    max_queue_time: float | None = None
    target_queue_time: float | None = None
    inactivity_timeout: float | None = None
    endpoint_state: EndpointState | None = None
    autoscaler_instance: str | None = None


def wanted(body: EndpointBody) -> dict[str, Any]:
    """The set fields, the console's name translated."""
    values = given(body)
    if (min_workers := values.pop("min_workers", None)) is not None:
        values.setdefault("cold_workers", min_workers)
    return values


def shown(endpoint: Endpoint, key: str) -> dict[str, Any]:
    """An item of a listing."""
    return {
        "id": endpoint.id,
        "endpoint_name": endpoint.endpoint_name,
        "api_key": key,
        "user_id": endpoint.user_id,
        "created_at": endpoint.created_at,
        "cold_workers": endpoint.cold_workers,
        "max_workers": endpoint.max_workers,
        "min_load": endpoint.min_load,
        "min_cold_load": endpoint.min_cold_load,
        "target_util": endpoint.target_util,
        "cold_mult": endpoint.cold_mult,
        "max_queue_time": endpoint.max_queue_time,
        "target_queue_time": endpoint.target_queue_time,
        "inactivity_timeout": endpoint.inactivity_timeout,
        "endpoint_state": str(endpoint.endpoint_state),
        "autoscaler_instance": endpoint.autoscaler_instance,
        "auto_delete_in_seconds": None,
        "auto_delete_due_24h": False,
    }


def router(management: Management, keyring: Keyring, workers: Workers, caller: Caller) -> APIRouter:
    """The routes; a deletion tells which workers it sets draining."""
    routes = APIRouter(tags=["endpoints"])

    async def list_endpoints(request: Request) -> JsonResponse:
        principal, key = await caller.holder(request)
        found = management.endpoints(principal)
        rows = [shown(endpoint, keyring.shown_key(endpoint, principal, key)) for endpoint in found]
        return JsonResponse({"success": True, "results": rows})

    async def create_endpoint(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, EndpointBody)
        endpoint = await management.create_endpoint(principal, wanted(body))
        return JsonResponse({"success": True, "result": endpoint.id})

    async def show_endpoint(request: Request, endpoint_id: int) -> JsonResponse:
        principal, key = await caller.holder(request)
        endpoint = management.endpoint(principal, endpoint_id)
        return JsonResponse({"success": True, "result": shown(endpoint, keyring.shown_key(endpoint, principal, key))})

    async def update_endpoint(request: Request, endpoint_id: int) -> JsonResponse:
        principal, body = await caller.call(request, EndpointBody)
        endpoint = await management.update_endpoint(principal, endpoint_id, wanted(body))
        return JsonResponse({"success": True, "result": shown(endpoint, keyring.endpoint_key(endpoint))})

    async def delete_endpoint(request: Request, endpoint_id: int) -> JsonResponse:
        principal = await caller.principal(request)
        await management.delete_endpoint(principal, endpoint_id)
        leaving = sorted(worker.id for worker in workers.of_endpoint(endpoint_id))
        msg = f"endpoint {endpoint_id} deleted; {len(leaving)} workers drain and go"
        return JsonResponse({"success": True, "deleted_workers": leaving, "failed_workers": [], "msg": msg})

    async def rotate_endpoint_key(request: Request, endpoint_id: int) -> JsonResponse:
        principal = await caller.principal(request)
        endpoint = await management.rotate_endpoint_key(principal, endpoint_id)
        return JsonResponse({"success": True, "api_key": keyring.endpoint_key(endpoint)})

    base, one = "/api/v0/endptjobs/", "/api/v0/endptjobs/{endpoint_id}/"
    add(routes, ["GET"], [base], list_endpoints, summary="List endpoints, with their keys")
    add(routes, ["POST"], [base], create_endpoint, summary="Create an endpoint", body=EndpointBody)
    add(routes, ["GET"], [one], show_endpoint, summary="One endpoint")
    add(routes, ["PUT"], [one], update_endpoint, summary="Change an endpoint; nulls change nothing", body=EndpointBody)
    add(routes, ["DELETE"], [one], delete_endpoint, summary="Delete an endpoint, its workergroups and workers")
    add(
        routes,
        ["POST"],
        ["/v1/endpoints/{endpoint_id}/rotate-key"],
        rotate_endpoint_key,
        summary="Give the endpoint a new key; the old one stops working",
    )
    return routes

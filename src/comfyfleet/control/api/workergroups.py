"""`/api/v0/workergroups/`, also named `/api/v0/autojobs/`: one resource, two names; and `/update_workers/`."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request

from comfyfleet.control.api.calling import Caller, add, given
from comfyfleet.control.auth import Principal
from comfyfleet.control.keys import Keyring
from comfyfleet.control.management import Management
from comfyfleet.control.records import Workergroup
from comfyfleet.control.workers import Workers
from comfyfleet.web import JsonResponse
from comfyfleet.wire.errors import FleetError, InvalidArguments


class WorkergroupBody(msgspec.Struct, kw_only=True):
    """search_params: text or a query dict. Null or absent: the default, or as it is. Unknown fields are ignored."""

    endpoint_id: int | None = None
    endpoint_name: str | None = None
    template_hash: str | None = None
    template_id: int | None = None
    search_params: str | dict[str, Any] | None = None
    launch_args: str | None = None
    gpu_ram: float | None = None
    test_workers: int | None = None
    min_load: float | None = None
    min_cold_load: float | None = None
    target_util: float | None = None
    cold_mult: float | None = None
    cold_workers: int | None = None
    max_workers: int | None = None
    autoscaler_instance: str | None = None


class UpdateWorkersBody(msgspec.Struct, kw_only=True):
    """POST /update_workers/."""

    workergroup_id: int = 0
    cancel_update: bool = False


def router(management: Management, keyring: Keyring, workers: Workers, caller: Caller) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["workergroups"])

    def shown(group: Workergroup, principal: Principal, key: str) -> dict[str, Any]:
        endpoint = management.known_endpoint(group.endpoint_id)
        shown_key = keyring.shown_key(endpoint, principal, key) if endpoint is not None else ""
        return {**msgspec.structs.asdict(group), "api_key": shown_key}

    def members(workergroup_id: int, endpoint_id: int) -> list[int]:
        return sorted(worker.id for worker in workers.of_endpoint(endpoint_id) if worker.group_id == workergroup_id)

    async def list_workergroups(request: Request) -> JsonResponse:
        principal, key = await caller.holder(request)
        rows = [shown(group, principal, key) for group in management.workergroups(principal)]
        return JsonResponse({"success": True, "results": rows})

    async def create_workergroup(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, WorkergroupBody)
        group = await management.create_workergroup(principal, given(body))
        return JsonResponse({"success": True, "id": group.id, "result": group.id})

    async def show_workergroup(request: Request, workergroup_id: int) -> JsonResponse:
        principal, key = await caller.holder(request)
        group = management.workergroup(principal, workergroup_id)
        return JsonResponse({"success": True, "result": shown(group, principal, key)})

    async def update_workergroup(request: Request, workergroup_id: int) -> JsonResponse:
        principal, body = await caller.call(request, WorkergroupBody)
        group = await management.update_workergroup(principal, workergroup_id, given(body))
        return JsonResponse({"success": True, "result": shown(group, principal, "")})

    async def delete_workergroup(request: Request, workergroup_id: int) -> JsonResponse:
        principal = await caller.principal(request)
        group = await management.delete_workergroup(principal, workergroup_id)
        leaving = members(workergroup_id, group.endpoint_id)
        msg = f"workergroup {workergroup_id} deleted; {len(leaving)} workers drain and go"
        return JsonResponse({"success": True, "deleted_workers": leaving, "failed_workers": [], "msg": msg})

    async def update_workers(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, UpdateWorkersBody)
        if body.workergroup_id == 0:
            raise InvalidArguments("workergroup_id is needed", field="workergroup_id")
        try:
            group = await management.set_rolling_update(
                principal, body.workergroup_id, is_updating=not body.cancel_update
            )
        except FleetError as error:
            refused = {"success": False, "error_msg": error.message, "error": error.code, "msg": error.message}
            return JsonResponse(refused, status_code=error.status)
        if body.cancel_update:
            return JsonResponse({"success": True, "cancelled": True})
        count = len(members(group.id, group.endpoint_id))
        return JsonResponse({"success": True, "cancelled": False, "workers_to_update": count})

    every = ["/api/v0/workergroups/", "/api/v0/autojobs/"]
    one = ["/api/v0/workergroups/{workergroup_id}/", "/api/v0/autojobs/{workergroup_id}/"]
    add(routes, ["GET"], every, list_workergroups, summary="List workergroups")
    add(routes, ["POST"], every, create_workergroup, summary="Create a workergroup", body=WorkergroupBody)
    add(routes, ["GET"], one, show_workergroup, summary="One workergroup")
    add(routes, ["PUT"], one, update_workergroup, summary="Change a workergroup", body=WorkergroupBody)
    add(routes, ["DELETE"], one, delete_workergroup, summary="Delete a workergroup and its workers")
    add(
        routes,
        ["POST"],
        ["/update_workers/"],
        update_workers,
        summary="Update every worker of a workergroup, drained one after the other; or call that off",
        body=UpdateWorkersBody,
    )
    return routes

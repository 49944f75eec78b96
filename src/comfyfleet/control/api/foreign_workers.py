"""Workers brought by hand: register one and get what it has to be started with; remove one; read a worker's log.

For machines that no fleet provider starts: a rented container with the public worker framework, a computer under a
desk. Such a worker is routed to like any other, and never started or stopped by us.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from comfyfleet.control.api.calling import query_number, read_body
from comfyfleet.control.auth import MANAGE, READ
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.fleet.base import FleetProvider
from comfyfleet.control.keys import Keyring
from comfyfleet.control.lifecycle import Lifecycle
from comfyfleet.control.scaling import Action, Verb
from comfyfleet.control.worker import Worker
from comfyfleet.control.workers import Workers
from comfyfleet.web import NOT_JSON, JsonResponse, bearer_key, control_error, whole_number
from comfyfleet.wire.errors import BadRequest, FleetError, NotFound

MAX_TAIL = 10_000


class RegisterBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/workers. workergroup_id 0: of none. id: the worker's own number (CONTAINER_ID), or a fresh one."""

    endpoint: str
    workergroup_id: int = 0
    id: int | None = None


class ForeignWorkerApi:
    """Handlers over the registry."""

    def __init__(
        self,
        *,
        lifecycle: Lifecycle,
        workers: Workers,
        catalog: Catalog,
        keys: Keyring,
        provider: FleetProvider | None,
    ) -> None:
        self._lifecycle = lifecycle
        self._workers = workers
        self._catalog = catalog
        self._keys = keys
        self._provider = provider

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/workers", self.register, methods=["POST"]),
            Route("/v1/workers/{worker_id}", self.remove, methods=["DELETE"]),
            Route("/v1/workers/{worker_id}/logs", self.logs, methods=["GET"]),
        ]

    async def register(self, request: Request) -> Response:
        try:
            principal = self._keys.principal(bearer_key(request))
            try:
                body = msgspec.json.decode(await read_body(request), type=RegisterBody)
            except NOT_JSON as error:
                raise BadRequest(str(error)) from error
            principal.demand(MANAGE)
            endpoint = self._catalog.endpoint_named(body.endpoint, principal.user_id)
            if endpoint is None or not principal.may(MANAGE, endpoint.id):
                raise NotFound(f"there is no endpoint named {body.endpoint!r}", field="endpoint")
            group = self._catalog.workergroup(body.workergroup_id)
            if body.workergroup_id and (group is None or group.endpoint_id != endpoint.id):
                raise BadRequest("that workergroup is not this endpoint's", field="workergroup_id")
            if body.id is not None and (not 0 < body.id < 10**18 or self._workers.get(body.id) is not None):
                raise BadRequest(f"worker id {body.id} is taken or not from 1 to 10^18", field="id")
            worker = await self._lifecycle.register(endpoint.id, body.workergroup_id, body.id)
        except FleetError as error:
            return control_error(error)
        environment = {"CONTAINER_ID": str(worker.id), "MASTER_TOKEN": worker.mtoken}
        return JsonResponse({"id": worker.id, "mtoken": worker.mtoken, "environment": environment}, status_code=201)

    async def remove(self, request: Request) -> Response:
        try:
            worker = self._allowed(request, MANAGE)
            if not worker.is_foreign:
                raise BadRequest("the fleet started this worker; it also ends it", field="worker_id")
            action = Action(verb=Verb.DESTROY, group_id=worker.group_id, worker_id=worker.id)
            await self._lifecycle.apply(action)
        except FleetError as error:
            return control_error(error)
        return JsonResponse({"success": True})

    async def logs(self, request: Request) -> Response:
        try:
            worker = self._allowed(request, READ)
            tail = query_number(request, "tail", 1000, lowest=0, highest=MAX_TAIL)
            text = await self._provider.logs(worker.id, tail) if self._provider is not None else ""
        except FleetError as error:
            return control_error(error)
        return PlainTextResponse(text)

    def _allowed(self, request: Request, right: str) -> Worker:
        principal = self._keys.principal(bearer_key(request))
        worker_id = whole_number(request.path_params["worker_id"])
        worker = None if worker_id is None else self._workers.get(worker_id)
        if worker is None or not principal.may(right, worker.endpoint_id):
            raise NotFound("there is no such worker")
        return worker

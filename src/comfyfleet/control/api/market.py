"""`/api/v0/bundles/`, `/benchmarks`, `/instances/{id}/`: what the known command line asks a market."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request

from comfyfleet.control import market
from comfyfleet.control.api.calling import Caller, add
from comfyfleet.control.auth import READ
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.fleet.base import FleetProvider
from comfyfleet.control.workers import Workers
from comfyfleet.web import NOT_JSON, JsonResponse, whole_number
from comfyfleet.wire.errors import InvalidArguments, NotFound


class Asks(msgspec.Struct, kw_only=True):
    """The newer form of a search: the query is one of its fields."""

    q: dict[str, Any] = {}


class Search(msgspec.Struct, kw_only=True):
    """A search for offers: clauses by field, beside `limit`, `order` and `type`."""

    limit: int | None = None


def selected(request: Request) -> dict[str, dict[str, Any]]:
    """`?select_filters=`, a JSON object of clauses. Raises InvalidArguments."""
    try:
        query = msgspec.json.decode(request.query_params.get("select_filters") or "{}", type=dict[str, Any])
    except NOT_JSON as error:
        raise InvalidArguments("select_filters is no JSON object", field="select_filters") from error
    return market.asked(query)


def router(*, provider: FleetProvider | None, workers: Workers, catalog: Catalog, caller: Caller) -> APIRouter:
    """The routes. Machines belong to no endpoint: a key that is bound to some is refused."""
    routes = APIRouter(tags=["market"])

    async def found(query: dict[str, Any]) -> JsonResponse:
        nodes = await provider.nodes() if provider is not None else []
        limit = query.get("limit")
        rows = market.offers(nodes, market.asked(query))
        return JsonResponse({"success": True, "offers": rows[:limit] if isinstance(limit, int) else rows})

    async def search_offers(request: Request) -> JsonResponse:
        principal, query = await caller.call(request, dict[str, Any])
        principal.demand_account_wide(READ)
        return await found(query)

    async def search_asks(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, Asks)
        principal.demand_account_wide(READ)
        return await found(body.q)

    async def search_benchmarks(request: Request) -> JsonResponse:
        principal = await caller.principal(request)
        principal.demand(READ)
        seen = [worker for worker in workers.all() if principal.may(READ, worker.endpoint_id)]
        rows = market.benchmarks(seen, catalog, selected(request))
        return JsonResponse({"success": True, "benchmarks": rows, "benchmarks_found": len(rows), "next_token": None})

    async def show_instance(request: Request) -> JsonResponse:
        principal = await caller.principal(request)
        worker_id = whole_number(request.path_params["worker_id"])
        worker = None if worker_id is None else workers.get(worker_id)
        if worker is None or not principal.may(READ, worker.endpoint_id):
            raise NotFound("there is no such worker", field="id")
        return JsonResponse({"success": True, "instances": market.instance(worker)})

    add(routes, ["POST"], ["/api/v0/bundles/"], search_offers, summary="Machines of this fleet, as offers", body=Search)
    add(routes, ["PUT"], ["/api/v0/search/asks/"], search_asks, summary="The same, asked the newer way", body=Asks)
    add(routes, ["GET"], ["/api/v0/benchmarks"], search_benchmarks, summary="Measured scores of this fleet's workers")
    add(routes, ["GET"], ["/api/v0/instances/{worker_id}/"], show_instance, summary="A worker, as an instance")
    return routes

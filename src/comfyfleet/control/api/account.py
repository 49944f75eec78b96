"""`/v1/keys` and `/v1/env`: API keys and the account's variables. A new key is in its answer and nowhere else."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request

from comfyfleet.clock import Clock
from comfyfleet.control.account import Account
from comfyfleet.control.api.calling import Caller, add
from comfyfleet.control.auth import ADMIN, JOBS, MANAGE, READ, ROUTE, SCOPES
from comfyfleet.control.keys import Keyring, digest, new_key
from comfyfleet.control.records import ApiKey, KeyLimits
from comfyfleet.control.store.base import Store
from comfyfleet.ids import Ids
from comfyfleet.web import JsonResponse, finite
from comfyfleet.wire.errors import InvalidArguments, NotFound

_MOST = 1e12  # of any limit


class GivenLimits(KeyLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits as a caller sets them: a misspelt one would be no limit."""


class KeyBody(msgspec.Struct, kw_only=True):
    """A new key. scopes: of admin, manage, read, route, jobs. endpoint_ids: empty for all. limits: 0 is none."""

    name: str = ""
    scopes: tuple[str, ...] = (READ, ROUTE, JOBS)
    endpoint_ids: tuple[int, ...] = ()
    expires_in_s: float | None = None
    limits: GivenLimits = GivenLimits()


class VariableBody(msgspec.Struct, kw_only=True):
    """A variable's value; secret ones are never shown again."""

    value: str
    is_secret: bool = True


def check_key(body: KeyBody) -> None:
    """Raises InvalidArguments naming the field, for what makes no key or another key than was meant."""
    if unknown := sorted(set(body.scopes) - set(SCOPES)):
        raise InvalidArguments(f"unknown scope {unknown[0]!r}; there are {', '.join(SCOPES)}", field="scopes")
    if not body.scopes:
        raise InvalidArguments("a key without a scope is good for nothing", field="scopes")
    if ADMIN in body.scopes and body.endpoint_ids:
        raise InvalidArguments("an admin's key is the whole account's: name no endpoints", field="endpoint_ids")
    if body.expires_in_s is not None and body.expires_in_s <= 0:
        raise InvalidArguments("expires_in_s must be over 0", field="expires_in_s")
    for name, limit in msgspec.structs.asdict(body.limits).items():
        if not 0 <= limit <= _MOST or (name == "weight" and limit == 0):
            lowest = "over 0" if name == "weight" else "0 (no limit) or more"
            raise InvalidArguments(
                f"{name} must be {lowest} and at most {_MOST:g}, not {limit:g}", field=f"limits.{name}"
            )


def shown(key: ApiKey) -> dict[str, Any]:
    """A key without its digest."""
    return {name: value for name, value in msgspec.structs.asdict(key).items() if name != "digest"}


def router(account: Account, keyring: Keyring, store: Store, caller: Caller, clock: Clock, ids: Ids) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["account"])

    async def list_keys(request: Request) -> JsonResponse:
        (await caller.principal(request)).demand_account_wide(ADMIN)
        return JsonResponse({"keys": [shown(key) for key in keyring.made_keys()]})

    async def create_key(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, KeyBody)
        principal.demand_account_wide(ADMIN)
        check_key(body)
        if unknown := [number for number in body.endpoint_ids if not keyring.opens(number)]:
            raise InvalidArguments(f"there is no endpoint {unknown[0]}", field="endpoint_ids", endpoint_ids=unknown)
        secret = new_key(ids)
        now = clock.now()
        key = ApiKey(
            id=str(await store.reserve("key")),
            name=body.name,
            digest=digest(secret),
            scopes=body.scopes,
            endpoint_ids=body.endpoint_ids,
            created_at=now,
            expires_at=None if body.expires_in_s is None else now + body.expires_in_s,
            limits=body.limits,
        )
        await store.put(key)
        keyring.put(key)
        return JsonResponse({**shown(key), "key": secret})

    async def revoke_key(request: Request, key_id: str) -> JsonResponse:
        (await caller.principal(request)).demand_account_wide(ADMIN)
        if key_id not in [key.id for key in keyring.made_keys()]:
            raise NotFound("there is no such key", id=key_id)
        await store.drop(ApiKey, key_id)
        keyring.drop(key_id)
        return JsonResponse({"success": True})

    async def list_variables(request: Request) -> JsonResponse:
        (await caller.principal(request)).demand_account_wide(MANAGE)
        rows = [
            {
                "name": variable.name,
                "is_secret": variable.is_secret,
                "updated_at": variable.updated_at,
                "value": value,
            }
            for variable, value in account.variables()
        ]
        return JsonResponse({"variables": rows})

    async def set_variable(request: Request, name: str) -> JsonResponse:
        principal, body = await caller.call(request, VariableBody)
        principal.demand_account_wide(MANAGE)
        await account.set(name, body.value, is_secret=body.is_secret)
        return JsonResponse({"success": True, "msg": "workers that start from now on have it"})

    async def unset_variable(request: Request, name: str) -> JsonResponse:
        (await caller.principal(request)).demand_account_wide(MANAGE)
        await account.unset(name)
        return JsonResponse({"success": True})

    async def show_usage(request: Request) -> JsonResponse:
        principal = await caller.principal(request)
        principal.demand(READ)
        since = _epoch(request, "since", clock.now() - 30 * 86_400)
        until = _epoch(request, "until", clock.now())
        scope = None if principal.sees_all else principal.scope
        return JsonResponse(
            {"since": since, "until": until, "usage": await store.usage(since=since, until=until, scope=scope)}
        )

    add(routes, ["GET"], ["/v1/keys"], list_keys, summary="List keys, without the keys themselves")
    add(
        routes,
        ["POST"],
        ["/v1/keys"],
        create_key,
        summary="Make a key; its answer is the only place it is shown",
        body=KeyBody,
    )
    add(routes, ["DELETE"], ["/v1/keys/{key_id}"], revoke_key, summary="Revoke a key at once")
    add(routes, ["GET"], ["/v1/env"], list_variables, summary="Account variables; secret values are not shown")
    add(
        routes,
        ["PUT"],
        ["/v1/env/{name}"],
        set_variable,
        summary="Set a variable for every worker that starts",
        body=VariableBody,
    )
    add(routes, ["DELETE"], ["/v1/env/{name}"], unset_variable, summary="Forget a variable")
    add(routes, ["GET"], ["/v1/usage"], show_usage, summary="Worker seconds and job seconds, with prices")
    return routes


def _epoch(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    at = default if text is None else finite(text)
    if at is None:
        raise InvalidArguments(f"{name} is seconds since the epoch", field=name)
    return at

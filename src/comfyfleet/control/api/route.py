"""`POST /route/`, the two public keys, and nothing else of the desk.

Never an answer but 200, 400, 401 and 403: the public client takes any other status for the end of its request, so
"busy", "starting" and "no worker" are 200 without a `url`. An answer may be held for a moment when that brings the
worker sooner; the client gives up on one after 10 s.
"""

from __future__ import annotations

import math
from functools import lru_cache

import anyio
import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from comfyfleet.clock import Clock
from comfyfleet.control.api.calling import read_body
from comfyfleet.control.auth import ROUTE
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.desk import Desk
from comfyfleet.control.keys import Keyring
from comfyfleet.control.learned_cost import LearnedCost
from comfyfleet.control.placements import Placed, TakeRequest
from comfyfleet.control.tickets import Tickets
from comfyfleet.ids import Ids
from comfyfleet.web import NOT_JSON, bearer_key, control_error
from comfyfleet.wire.errors import BadRequest, FleetError, Forbidden, NotFound, PayloadTooLarge
from comfyfleet.wire.routing import RouteRequest, RouteWaiting

log = structlog.get_logger()

MAX_BODY_BYTES = 64 * 1024
MAX_COST = 1e9
# How long an answer is held while there is no worker: long enough to spare a poll, short enough that a caller's own
# `timeout`, which the public client checks between polls only, is overrun by less than 6 s.
HELD_S = 0.8
# Our own client may ask to be held longer (header `Prefer: wait=N`).
HELD_CAP_S = 8.0

_NO_MODELS: frozenset[str] = frozenset()

_decoder = msgspec.json.Decoder(RouteRequest)
_encoder = msgspec.json.Encoder()


class RouteApi:
    """Handlers over one desk."""

    def __init__(
        self,
        *,
        desk: Desk,
        catalog: Catalog,
        keys: Keyring,
        tickets: Tickets,
        learned: LearnedCost,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._desk = desk
        self._catalog = catalog
        self._keys = keys
        self._tickets = tickets
        self._learned = learned
        self._clock = clock
        self._ids = ids

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/route/", self.route, methods=["POST"]),
            Route("/pubkey/", self.rsa_key, methods=["GET"]),
            Route("/pubkey/ed25519", self.ed25519_key, methods=["GET"]),
        ]

    async def rsa_key(self, _request: Request) -> Response:
        return PlainTextResponse(self._tickets.rsa_public_pem)

    async def ed25519_key(self, _request: Request) -> Response:
        return PlainTextResponse(self._tickets.ed25519_public_pem)

    async def route(self, request: Request) -> Response:
        wanted = None
        try:
            wanted = parse_route_request(await read_body(request, MAX_BODY_BYTES))
            taken = self.admit(wanted, request)
        except PayloadTooLarge as error:
            return control_error(BadRequest(error.message))
        except FleetError as error:
            # Inside the four statuses: what else a key's owner could be told is a Forbidden here.
            return control_error(error if error.status in (400, 401, 403) else Forbidden(error.message))
        hold_s = held_s(request.headers.get("prefer", ""))
        try:
            return await self._answer(taken, hold_s)
        except Exception:  # request boundary: a bug must not end a client's request either
            log.exception("route.failed", endpoint=taken.endpoint_name)
            return _json(
                RouteWaiting(
                    endpoint=taken.endpoint_name,
                    status="error",
                    request_idx=taken.request_idx or self._desk.new_number(),
                    reason="the control plane failed on this request; it is tried again with the next poll",
                    request_id=self._ids.request_id(),
                )
            )

    def admit(self, wanted: RouteRequest, request: Request) -> TakeRequest:
        """Who asks, for what: a request for the desk. Raises BadRequest, Unauthorized, Forbidden."""
        key = wanted.api_key or bearer_key(request)
        principal = self._keys.principal(key)
        endpoint = self._catalog.endpoint_named(wanted.endpoint, principal.user_id)
        if endpoint is None:
            raise BadRequest(f"there is no endpoint named {wanted.endpoint!r}", field="endpoint")
        try:
            principal.demand(ROUTE, endpoint.id)
        except NotFound as error:
            raise BadRequest(f"there is no endpoint named {wanted.endpoint!r}", field="endpoint") from error
        hint = wanted.hint
        shape = hint.shape if hint is not None else ""
        learned = self._learned.cost(endpoint.id, shape) if shape else None
        return TakeRequest(
            endpoint_id=endpoint.id,
            endpoint_name=endpoint.endpoint_name,
            max_queue_time=endpoint.max_queue_time,
            scope=principal.scope,
            cost=wanted.cost if learned is None else learned,
            request_idx=wanted.request_idx,
            replay_timeout=min(max(wanted.replay_timeout, 1.0), 3600.0),
            models=_model_set(hint.models) if hint is not None else _NO_MODELS,
            shape=shape,
        )

    async def _answer(self, taken: TakeRequest, hold_s: float) -> Response:
        until = self._clock.monotonic() + hold_s
        while True:
            found = self._desk.take(taken)
            if isinstance(found, Placed):
                return _json(found.answer)
            ticket = found.ticket
            taken = msgspec.structs.replace(taken, request_idx=ticket.request_idx)
            left_s = until - self._clock.monotonic()
            if left_s <= 0:
                response = _json(found.answer)
                if found.retry_after_s:
                    response.headers["Retry-After"] = str(math.ceil(found.retry_after_s))
                return response
            throttled_s = ticket.not_before - self._clock.now()
            if throttled_s > 0:
                # The throttle holds its own answer however short the hold: a tight loop has to wait for it.
                await self._clock.sleep(throttled_s)
                until = max(until, self._clock.monotonic() + 0.001)
                continue
            if ticket.changed is None:
                ticket.changed = anyio.Event()
            with anyio.move_on_after(left_s):
                await ticket.changed.wait()


@lru_cache(maxsize=256)
def _model_set(models: tuple[str, ...]) -> frozenset[str]:
    """One set for all requests that name the same models: a ticket keeps it as long as it lives."""
    return frozenset(models)


def parse_route_request(body: bytes) -> RouteRequest:
    """The body, checked. Raises BadRequest naming the field."""
    try:
        wanted = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(str(error)) from error
    except NOT_JSON as error:
        raise BadRequest("the body is not JSON") from error
    if not wanted.endpoint:
        raise BadRequest("`endpoint` is empty", field="endpoint")
    if not 0 <= wanted.cost <= MAX_COST:
        raise BadRequest(f"`cost` must be between 0 and {MAX_COST:g}", field="cost")
    if not 0 <= wanted.request_idx < 2**63:
        raise BadRequest("`request_idx` must be a number from an earlier answer, or 0", field="request_idx")
    return wanted


def held_s(prefer: str) -> float:
    """How long this caller lets an answer be held: `Prefer: wait=N` (RFC 7240), else the default."""
    for part in prefer.split(","):
        name, _, value = part.strip().partition("=")
        if name.lower() == "wait" and value.isascii() and value.isdigit():
            return min(float(value), HELD_CAP_S)
    return HELD_S


def _json(answer: msgspec.Struct) -> Response:
    return Response(_encoder.encode(answer), media_type="application/json")

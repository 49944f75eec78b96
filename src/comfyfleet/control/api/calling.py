"""What every management route does: find the key (header, query or body), read the body, render answers and errors.

The real clients put the key into any of the three places and send JSON bodies even with GET and DELETE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import structlog
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from comfyfleet.control.auth import Principal
from comfyfleet.control.keys import Keyring
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.web import NOT_JSON, JsonResponse, bearer_key, control_error, whole_number
from comfyfleet.wire.errors import BadRequest, FleetError, InvalidArguments, PayloadTooLarge, Unavailable

T = TypeVar("T")
_NAMED = re.compile(r"(?:unknown|missing required) field `([^`]+)`")
MAX_BODY_BYTES = 32 * 1024 * 1024

log = structlog.get_logger()


async def read_body(request: Request, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The raw body. Raises PayloadTooLarge before reading more than the limit."""
    if int(request.headers.get("content-length") or 0) > limit_bytes:
        raise PayloadTooLarge(f"the body is over {limit_bytes} bytes", limit_bytes=limit_bytes)
    chunks, size, is_whole = [], 0, False
    while not is_whole:  # Starlette's own stream is a generator around this loop, and every call passes here
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise PayloadTooLarge(f"the body is over {limit_bytes} bytes", limit_bytes=limit_bytes)
        chunks.append(chunk)
        is_whole = not message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def parse(raw: bytes, kind: type[T]) -> T:
    """A body as a struct or a dict; an empty one is `{}`. Raises BadRequest, or InvalidArguments naming the field."""
    try:
        return msgspec.json.decode(raw or b"{}", type=kind, strict=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        # Of a field that is missing, or that there is none of, msgspec's path says only where it would be.
        place = (path.strip("`."), *_NAMED.findall(message))
        raise InvalidArguments(str(error), field=".".join(filter(None, place)) or None, reason=message) from error
    except NOT_JSON as error:
        raise BadRequest("the body is not valid JSON") from error


class _WithKey(msgspec.Struct):
    api_key: str = ""


def key_of(request: Request, raw: bytes) -> str:
    """The caller's key: header, query, else the body's `api_key`."""
    if key := bearer_key(request):
        return key
    try:
        return msgspec.json.decode(raw, type=_WithKey).api_key if raw else ""
    except NOT_JSON:
        return ""


class Caller:
    """Reads who calls and with what."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    async def principal(self, request: Request) -> Principal:
        """For routes without a body of interest. Raises Unauthorized."""
        return self._keyring.principal(key_of(request, await read_body(request)))

    async def holder(self, request: Request) -> tuple[Principal, str]:
        """Who, and the very key: for answers that hand a key back."""
        key = key_of(request, await read_body(request))
        return self._keyring.principal(key), key

    async def call(self, request: Request, kind: type[T]) -> tuple[Principal, T]:
        """Who, and the body as `kind`. The key is checked before the body is judged."""
        raw = await read_body(request)
        principal = self._keyring.principal(key_of(request, raw))
        return principal, parse(raw, kind)


def query_number(request: Request, name: str, default: int, *, lowest: int, highest: int) -> int:
    """A number of the query. Raises InvalidArguments naming it."""
    number = whole_number(request.query_params.get(name, str(default)))
    if number is None or not lowest <= number <= highest:
        raise InvalidArguments(f"{name} must be from {lowest} to {highest}", field=name)
    return number


def given(body: msgspec.Struct) -> dict[str, Any]:
    """What was set: null and absent both mean "as it is"."""
    return {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}


def documented(body: type[msgspec.Struct]) -> dict[str, Any]:
    """`openapi_extra` for a route that parses its own body."""
    (schema,), components = msgspec.json.schema_components([body], ref_template="#/components/schemas/{name}")
    if "$ref" in schema:
        schema = components.get(schema["$ref"].rpartition("/")[2], schema)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add(
    router: APIRouter,
    methods: Sequence[str],
    paths: Sequence[str],
    handler: Any,
    *,
    summary: str,
    body: type[msgspec.Struct] | None = None,
) -> None:
    """Register a handler that takes the request and returns a response; later paths are aliases of the first."""
    for position, path in enumerate(paths):
        for method in methods:
            router.add_api_route(
                path,
                handler,
                methods=[method],
                summary=summary,
                response_model=None,
                response_class=JsonResponse,
                include_in_schema=position == 0,
                operation_id=f"{handler.__name__}_{method.lower()}_{position}",
                openapi_extra=documented(body) if body is not None and method != "GET" else None,
            )


async def fleet_error(_request: Request, error: Exception) -> Response:
    """The renderer of every error we mean to show."""
    assert isinstance(error, FleetError)  # noqa: S101 - registered for this class
    return control_error(error)


async def database_gone(_request: Request, error: Exception) -> Response:
    """The database is away for a moment."""
    assert isinstance(error, ConnectionLost)  # noqa: S101 - registered for this class
    log.warning("store.unreachable", error=str(error))
    return control_error(Unavailable("the database does not answer", retry_after_s=2.0))


async def bug(request: Request, error: Exception) -> Response:
    """A 500 with nothing of its insides; the log has the traceback."""
    log.error("http.failed", path=request.url.path, exc_info=error)
    return JsonResponse({"success": False, "error": "internal_error", "msg": "a bug; the log has it"}, status_code=500)


async def http_error(_request: Request, error: Exception) -> Response:
    """No such path, no such method: in the same shape as every other error."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return JsonResponse(
        {"success": False, "error": code, "msg": error.detail}, status_code=error.status_code, headers=error.headers
    )


ERROR_HANDLERS: dict[Any, Any] = {
    FleetError: fleet_error,
    HTTPException: http_error,
    ConnectionLost: database_gone,
    Exception: bug,
}


async def error_response(request: Request, error: Exception) -> Response:
    """What `ERROR_HANDLERS` makes of an error, for routes that no app stands around."""
    for kind, handler in ERROR_HANDLERS.items():
        if isinstance(error, kind):
            response: Response = await handler(request, error)
            return response
    raise error

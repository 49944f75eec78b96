"""How routes answer and read: JSON as ComfyUI sends it, bodies read up to the limit, refusals in its error shape."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from comfyfleet.engine.graph import PromptRefused

MAX_BODY_BYTES = 100 << 20
JSON = "application/json; charset=utf-8"

encode = msgspec.json.Encoder().encode


class TooLarge(Exception):
    """The body is over the limit."""


def json_answer(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status_code=status, media_type=JSON)


def empty(status: int = 200) -> Response:
    return Response(status_code=status)


def refusal(refused: PromptRefused) -> Response:
    return json_answer({"error": refused.error, "node_errors": refused.node_errors}, 400)


def bad_request(message: str, details: str = "") -> Response:
    """A refusal that concerns the request and no prompt."""
    return refusal(PromptRefused("invalid_request", message, details))


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. Raises TooLarge as soon as that is known."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLarge
    return bytes(body)


async def read_json(request: Request) -> Any:
    """The body's JSON. Raises PromptRefused when it is none."""
    try:
        return msgspec.json.decode(await read_body(request))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PromptRefused("invalid_request", "The body is not valid JSON.", str(error)) from error

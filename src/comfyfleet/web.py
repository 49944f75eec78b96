"""What the servers share: rendering errors, bearer parsing, server-sent events. Starlette only, no routes.

The worker answers errors in the result's shape, the control plane as `{error, msg, details}`; both come from the one
tree in `wire.errors`, and a bug becomes a 500 with a request id and nothing of its insides.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from comfyfleet.wire.errors import FleetError

# What msgspec raises for bytes that are no JSON. JSON of another shape, its ValidationError, is one of them too.
NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)

# A database's 64 bits hold any 18 digits, and not every 19; Python refuses to read thousands, and loudly.
_MOST_DIGITS = 18

_encoder = msgspec.json.Encoder()


class JsonResponse(Response):
    """A response body encoded by msgspec: structs, dicts and lists alike."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encoder.encode(content)


def whole_number(text: str) -> int | None:
    """A number as it is written in an address or a header, None for anything else; `²` is a digit to Python alone."""
    is_one = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    return int(text) if is_one else None


def finite(text: str) -> float | None:
    """A number with or without a fraction as it is written in an address; None for anything else, nan and inf too."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def bearer_key(request: Request) -> str:
    """The key of a request: `Authorization: Bearer`, else `?api_key=`, else ""."""
    header = request.headers.get("authorization", "")
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return request.query_params.get("api_key", "")


def retry_headers(error: FleetError) -> dict[str, str]:
    """`Retry-After` in whole seconds where the error carries an estimate."""
    if error.retry_after_s is None:
        return {}
    return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}


def control_error(error: FleetError) -> JsonResponse:
    """The control plane's error body."""
    body: dict[str, Any] = {"success": False, "error": error.code, "msg": error.message}
    if error.details:
        body["details"] = error.details
    return JsonResponse(body, status_code=error.status, headers=retry_headers(error))


def worker_error(error: FleetError, *, request_id: str = "") -> JsonResponse:
    """The worker's error body: a result whose status is `failed` (or `cancelled`)."""
    body: dict[str, Any] = {
        "id": request_id,
        "message": error.message,
        "status": "cancelled" if error.status == 499 else "failed",
        "comfyui_response": {},
        "output": [],
        "timings": {},
        "miniature": False,
        "error": error.as_dict(),
    }
    return JsonResponse(body, status_code=error.status, headers=retry_headers(error))


def sse_frame(data: bytes | str, *, event: str = "", event_id: str = "") -> bytes:
    """One server-sent event, ended by a blank line (clients drop a last event without it)."""
    text = data.decode() if isinstance(data, bytes) else data
    lines = [f"id: {event_id}"] if event_id else []
    if event:
        lines.append(f"event: {event}")
    lines.extend(f"data: {line}" for line in text.split("\n"))
    return ("\n".join(lines) + "\n\n").encode()

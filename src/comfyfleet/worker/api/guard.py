"""Who may talk to the wrapper at all. On loopback it is open, as users of the documents know it, but not to web pages:
Host must be a name of this machine, Origin (if any) must match it, and bodies must be declared as JSON or multipart, so
that no page in a browser and no rebound name can post a job. Anywhere else a key is needed.
"""

from __future__ import annotations

import hmac
import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from comfyfleet.web import worker_error
from comfyfleet.wire.errors import BadRequest, FleetError, Forbidden, Unauthorized

_OPEN_PATHS = frozenset({"/health", "/docs", "/openapi.json", "/docs/oauth2-redirect"})
_OPEN_PREFIXES = ("/files/",)  # a signed link is its own permission
_LOCAL_NAMES = frozenset({"localhost"})
_BODY_TYPES = ("application/json", "multipart/form-data")


class Guard:
    """ASGI middleware. key "": loopback only, no key asked for."""

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except FleetError as error:
            await worker_error(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES):
            return
        if self._key:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                raise Unauthorized("this worker needs its key: Authorization: Bearer <COMFYFLEET_WORKER_KEY>")
        else:
            check_same_machine(headers.get("host", ""), headers.get("origin", ""))
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if scope["method"] in ("POST", "PUT", "PATCH") and has_body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in _BODY_TYPES:
                raise BadRequest("Content-Type must be application/json", header="Content-Type")
            if headers.get("content-encoding", "identity").strip().lower() != "identity":
                raise BadRequest("bodies must not be compressed", header="Content-Encoding")


@lru_cache(maxsize=256)
def check_same_machine(host: str, origin: str) -> None:
    """Raises Forbidden unless Host is a loopback name and Origin, if there is one, has the same host."""
    if not _is_loopback(_hostname(f"//{host}")):
        raise Forbidden("Host must be a loopback name; set COMFYFLEET_WORKER_KEY to serve others", header="Host")
    if origin and not _is_loopback(_hostname(origin)):
        raise Forbidden("requests from other origins are refused", header="Origin")


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name.lower() in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

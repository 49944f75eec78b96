"""In front of the app, where several control planes share a database: each request is answered by whoever can.

A request about an endpoint (`whose` says which) goes to the endpoint's owner, over one pooled HTTP session, in one hop
(a header sees to it). While an endpoint has no owner the request waits for one, a little longer than a lease; it is
sent again to the new owner where the old one died with it and a repeat can do no harm. Everything else is answered
here, from the database; what is unknown here is looked up again before anybody is told that it does not exist.
Authentication is passed through: the owner decides.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp
import anyio
import msgspec
import structlog
from yarl import URL

from comfyfleet.clock import Clock
from comfyfleet.control.ownership import Replica
from comfyfleet.control.record_mirror import RecordMirror
from comfyfleet.control.replicas import Replicas
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.whose import Asked, Whose
from comfyfleet.web import JsonResponse, control_error
from comfyfleet.wire.errors import Misdirected, Unavailable

log = structlog.get_logger()

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HOP = "x-comfyfleet-hop"
_HOP = HOP.encode()
# Every replica knows some of the workers.
EVERYWHERE = ("GET", "/v1/workers")
_LOOK_AGAIN_S = 0.1
MAX_BODY_BYTES = 33 * 1024 * 1024  # more than any route takes, which then says so itself
# An answer of a known size up to this is taken whole before it is passed on, so that it can be had again elsewhere.
_WHOLE_BYTES = 4 * 1024 * 1024
_LISTING_TIMEOUT = aiohttp.ClientTimeout(total=2.0, sock_connect=1.0)
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=1.0)
_OWN_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"upgrade", b"expect"})
_LOOK_FIRST = frozenset({400, 401, 404})


class _Passed(StrEnum):
    """How an attempt at the owner ended. unsent: it cannot have arrived. cut: it may have."""

    DONE = "done"
    UNSENT = "unsent"
    CUT = "cut"


@dataclass(frozen=True, kw_only=True)
class _Request:
    scope: MutableMapping[str, Any]
    body: bytes
    endpoint_id: int
    is_repeatable: bool
    is_local_without_owner: bool
    wait_s: float


def forwarding_session(trusted: ssl.SSLContext | None) -> aiohttp.ClientSession:
    """The pool to the other replicas."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0, ssl=trusted or True)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=_TIMEOUT,
        skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
    )


class Forwarding:
    """An ASGI app around the app."""

    def __init__(
        self,
        app: App,
        *,
        replicas: Replicas,
        whose: Whose,
        mirror: RecordMirror,
        session: aiohttp.ClientSession,
        clock: Clock,
    ) -> None:
        self._app = app
        self._replicas = replicas
        self._whose = whose
        self._mirror = mirror
        self._session = session
        self._clock = clock

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if (scope["method"], scope["path"]) == EVERYWHERE and not _is_second_hop(scope):
            return await self._answer_everywhere(scope, send)
        rule = self._whose.rule(scope["method"], scope["path"])
        if rule is None:
            if self._whose.is_of_records(scope["path"]):
                await self._refreshed()
            return await self._app(scope, receive, send)
        body, rest = await _read(receive)
        seen = self._mirror.version
        if rest is not None:  # too large for anybody: the app says so
            return await self._app(scope, rest, send)
        asked = Asked(scope=scope, body=body)
        try:
            endpoint_id = await rule.find(asked)
            if endpoint_id is None and await self._refreshed(seen):
                endpoint_id = await rule.find(asked)
        except ConnectionLost:
            endpoint_id = None
        if endpoint_id is None or self._replicas.owns(endpoint_id):
            return await self._answer_here(scope, body, send)
        names = {name for name, _ in scope["headers"]}
        extra = rule.extra_headers(body, names)
        scope = {**scope, "headers": [*scope["headers"], *(extra or ())]}
        return await self._answer_elsewhere(
            _Request(
                scope=scope,
                body=body,
                endpoint_id=endpoint_id,
                is_repeatable=rule.is_repeatable and extra is not None,
                is_local_without_owner=rule.is_local_without_owner,
                wait_s=rule.wait_s,
            ),
            send,
        )

    async def _refreshed(self, seen: int | None = None) -> bool:
        try:
            return await self._mirror.refresh(seen)
        except ConnectionLost:
            return False

    async def _answer_here(self, scope: MutableMapping[str, Any], body: bytes, send: Send) -> None:
        """By the app; a "no such key", "no such endpoint" of its is said only after a look at the database."""
        doubted: list[Message] = []
        seen = self._mirror.version

        async def send_or_doubt(message: Message) -> None:
            if doubted or (message["type"] == "http.response.start" and message["status"] in _LOOK_FIRST):
                doubted.append(message)
            else:
                await send(message)

        await self._app(scope, _replayed(body), send_or_doubt)
        if doubted:
            if await self._refreshed(seen):
                return await self._app(scope, _replayed(body), send)
            for message in doubted:
                await send(message)
        return None

    async def _answer_everywhere(self, scope: MutableMapping[str, Any], send: Send) -> None:
        """Our workers, and those of every other replica that answers, as one list."""
        await self._refreshed()
        own: list[Message] = []

        async def keep(message: Message) -> None:
            own.append(message)

        await self._app(scope, _replayed(b""), keep)
        others = self._replicas.others()
        if own[0]["status"] != 200 or not others:
            for message in own:
                await send(message)
            return
        rows = _worker_rows(b"".join(message.get("body", b"") for message in own[1:]))

        async def ask(owner: Replica) -> None:
            try:
                async with self._session.get(
                    _url(owner, scope), headers=self._headers(scope), timeout=_LISTING_TIMEOUT
                ) as answer:
                    rows.extend(_worker_rows(await answer.read()) if answer.status == 200 else [])
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.info("forward.unreachable", owner=owner.url, why=str(error) or type(error).__name__)

        async with anyio.create_task_group() as asking:
            for other in others:
                asking.start_soon(ask, other)
        response = JsonResponse({"workers": sorted(rows, key=lambda row: int(row["id"]))})
        await response(scope, _replayed(b""), send)

    async def _answer_elsewhere(self, request: _Request, send: Send) -> None:
        scope = request.scope
        until = self._clock.monotonic() + request.wait_s
        while True:
            if self._replicas.owns(request.endpoint_id):
                return await self._answer_here(scope, request.body, send)
            if _is_second_hop(scope):
                self._replicas.kick()
                return await control_error(Misdirected("another replica owns it"))(scope, _replayed(b""), send)
            owner = self._replicas.owner_of(request.endpoint_id)
            if owner is not None:
                passed = await self._pass_on(request, owner, send)
                if passed is _Passed.DONE:
                    return None
                if passed is _Passed.CUT and not request.is_repeatable:
                    error = Unavailable("the control plane that had this request died; look before you repeat it")
                    return await control_error(error)(scope, _replayed(b""), send)
            if self._clock.monotonic() >= until:
                break
            self._replicas.kick()
            await self._replicas.changed(_LOOK_AGAIN_S)
        if request.is_local_without_owner:
            return await self._answer_here(scope, request.body, send)
        error = Unavailable("no control plane owns this endpoint at the moment", retry_after_s=1.0)
        return await control_error(error)(scope, _replayed(b""), send)

    async def _pass_on(self, request: _Request, owner: Replica, send: Send) -> _Passed:
        """One attempt; ends early when the endpoint gets another owner."""
        is_begun = False
        passed = _Passed.CUT
        with anyio.CancelScope() as attempt:
            forget = self._replicas.watch(request.endpoint_id, attempt)
            try:
                async with self._session.request(
                    request.scope["method"],
                    _url(owner, request.scope),
                    data=request.body or None,
                    headers=self._headers(request.scope),
                    allow_redirects=False,
                ) as answer:
                    if answer.status == Misdirected.status:
                        return _Passed.UNSENT
                    whole = None
                    if answer.content_length is not None and answer.content_length <= _WHOLE_BYTES:
                        whole = await answer.read()
                    is_begun = True
                    forget()  # from here on it is answered by this owner or not at all
                    await _relay(answer, whole, send)
                    passed = _Passed.DONE
            except aiohttp.ClientConnectorError as error:
                log.info("forward.unreachable", owner=owner.url, why=str(error))
                passed = _Passed.UNSENT
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.info("forward.cut", owner=owner.url, why=str(error) or type(error).__name__)
                if is_begun:
                    raise  # half an answer is out: the caller's connection is closed, and it comes again
            finally:
                forget()
        return passed

    def _headers(self, scope: MutableMapping[str, Any]) -> list[tuple[str, str]]:
        """The caller's, its own host included, so that links in the answer are the caller's."""
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name not in _OWN_HEADERS
        ]
        headers.append((HOP, self._replicas.id))
        return headers


def _is_second_hop(scope: MutableMapping[str, Any]) -> bool:
    """Another replica sent it here: it goes no further."""
    return any(name == _HOP for name, _ in scope["headers"])


def _worker_rows(body: bytes) -> list[dict[str, Any]]:
    return msgspec.json.decode(body, type=dict[str, list[dict[str, Any]]])["workers"]


def _url(owner: Replica, scope: MutableMapping[str, Any]) -> URL:
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope.get("query_string", b"")
    target = owner.url + path.decode("latin-1") + (f"?{query.decode('latin-1')}" if query else "")
    return URL(target, encoded=True)


async def _read(receive: Receive) -> tuple[bytes, Receive | None]:
    """(body, None), or for one that is too large a `receive` that gives it all again."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks), None
        chunk = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks), None
        if size > MAX_BODY_BYTES:
            return b"", _replayed(b"".join(chunks), more=receive)


def _replayed(body: bytes, more: Receive | None = None) -> Receive:
    """A `receive` that gives the body, then what follows."""
    is_given = False

    async def receive() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": more is not None}
        if more is not None:
            return await more()
        await anyio.sleep_forever()
        raise AssertionError

    return receive


async def _relay(answer: aiohttp.ClientResponse, whole: bytes | None, send: Send) -> None:
    headers = [(name.lower(), value) for name, value in answer.raw_headers]
    kept = [(name, value) for name, value in headers if name not in _OWN_HEADERS or name == b"content-length"]
    await send({"type": "http.response.start", "status": answer.status, "headers": kept})
    if whole is not None:
        await send({"type": "http.response.body", "body": whole, "more_body": False})
        return
    async for chunk in answer.content.iter_any():
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})

"""The short way to an engine: HTTP/1.1 over kept connections, for the small JSON calls that every job waits for.

A general client costs half a millisecond of work a call, and a job makes two. This one knows no redirects, proxies,
credentials, cookies or encodings, and no https: `Line.reaches` says whether a base URL can do without them, and an
answer that asks for more (a 3xx) is the caller's to repeat another way. Streams and files go through aiohttp.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

_CONNECT_S = 10.0
_SILENCE_S = 120.0  # of an engine that took a call, before it counts as gone
_MOST_IDLE = 32
_MEASURES = frozenset({b"content-length", b"transfer-encoding"})


class LineBroken(Exception):
    """No answer. `was_stale`: the engine had closed this kept connection, so it never saw the call."""

    def __init__(self, message: str, *, was_stale: bool = False) -> None:
        super().__init__(message)
        self.was_stale = was_stale


class _Connection(asyncio.Protocol):
    """One kept connection, one call at a time. Names in `on_*` are httptools'."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._parts: list[bytes] = []
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._calls = 0
        self._is_heard = False
        self._is_headed = False  # the answer's headers are there
        self._is_measured = False  # and say where its body ends
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = cast(asyncio.Transport, transport), True  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if exc is None and self._is_headed and not self._is_measured:
            self.on_message_complete()  # a body without a length ends with its connection
        self._fail(str(exc or "the engine closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._is_heard = True
        if self._answer is None or self._parser is None:
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as problem:
            self._fail(f"unreadable answer: {problem}")
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._is_measured = self._is_measured or name.lower() in _MEASURES

    def on_headers_complete(self) -> None:
        self._is_headed = True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and its like: the answer is still to come
            self._begin()
            return
        if not self._is_measured or not self._parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((status, b"".join(self._parts)))

    async def call(self, request: bytes, limit_s: float) -> tuple[int, bytes]:
        """Send and wait for the answer; whoever is cancelled meanwhile leaves a closed connection behind."""
        if self._transport is None or not self.is_open:
            raise LineBroken("the connection is closed", was_stale=True)
        self._calls += 1
        self._is_heard = False
        self._begin()
        self._parser = httptools.HttpResponseParser(self)
        self._answer = self._loop.create_future()
        overdue = self._loop.call_later(limit_s, self._fail, f"no answer within {limit_s:.0f} s")
        try:
            self._transport.write(request)
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            overdue.cancel()
            self._answer = self._parser = None

    def _begin(self) -> None:
        self._parts, self._is_headed, self._is_measured = [], False, False

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(LineBroken(why, was_stale=self._calls > 1 and not self._is_heard))


class Line:
    """Kept connections to one engine, as many as there are calls at a time."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._host_header = parts.netloc
        self._idle: list[_Connection] = []

    @staticmethod
    def reaches(base_url: str) -> bool:
        """Plain http, and nothing in the URL that only a general client knows."""
        parts = urlsplit(base_url)
        return parts.scheme == "http" and bool(parts.hostname) and "@" not in parts.netloc and not parts.query

    async def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body. A call that can be repeated is, once, when its connection had gone stale.

        Raises LineBroken, or OSError when there is nobody to connect to.
        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: {self._host_header}\r\nAccept: */*\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        request = head.encode("ascii") + b"\r\n" + (body or b"")
        connection = self._take() or await self._connect()
        try:
            answer = await connection.call(request, _SILENCE_S)
        except LineBroken as broken:
            if method != "GET" or not broken.was_stale:
                raise
            connection = await self._connect()
            answer = await connection.call(request, _SILENCE_S)
        if connection.is_open and len(self._idle) < _MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_S):
            _, connection = await loop.create_connection(lambda: _Connection(loop), self._host, self._port)
        return connection

"""Sockets and servers for every role: uvicorn without its hold on the process's signals.

Signals belong to a composition root, which has loops to end as well as a server. No routes and no settings here.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from comfyfleet.wire.errors import FleetError


class CannotListen(FleetError):
    """This address cannot be listened on: taken, not of this machine, or no address at all."""

    code, status = "cannot_listen", 409


class QuietServer(uvicorn.Server):
    """Runs until cancelled or until `should_exit` is set; never touches a signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatheredWrites(asyncio.Transport):
    """A transport whose writes wait for the end of the event loop's turn, and leave together.

    uvicorn writes an answer's head and its body apart: two system calls here, two packets, two wake-ups at the reader.
    More than `MOST_BYTES` leave at once, so that a reader who is slow is still felt by who writes.
    """

    MOST_BYTES = 64 * 1024

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes | bytearray | memoryview] = []
        self._size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size > self.MOST_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pieces:
            pieces, self._pieces, self._size = self._pieces, [], 0
            self._transport.writelines(pieces)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)


class OneWrite(HttpToolsProtocol):
    """uvicorn's protocol over gathered writes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(GatheredWrites(transport, self.loop))


class HearsOut:
    """An app that answers at once, and lets the caller finish its body before the connection may close.

    A caller who is cut off while it sends reads no answer: a refusal of a long body would look like a lost connection.
    What comes is dropped, for `LIMIT_S`. A caller that asks first (`Expect: 100-continue`) has nothing to finish.
    """

    SHORT_BYTES = 64 * 1024  # such a body is here as soon as its head is
    LIMIT_S = 10.0

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._may_be_cut_off(scope["headers"]):
            await self._app(scope, receive, send)
            return
        is_whole = False

        async def hear() -> Message:
            nonlocal is_whole
            message = await receive()
            is_whole = not message.get("more_body", False)
            return message

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False) and not is_whole:
                await send({**message, "more_body": True})
                with anyio.move_on_after(self.LIMIT_S):
                    while not is_whole:
                        await hear()
                message = {"type": "http.response.body"}
            await send(message)

        await self._app(scope, hear, tell)

    def _may_be_cut_off(self, headers: list[tuple[bytes, bytes]]) -> bool:
        is_long = False
        for name, value in headers:
            if name == b"expect":
                return False
            if name == b"content-length":
                is_long = int(value) > self.SHORT_BYTES  # the parser lets digits through only
            elif name == b"transfer-encoding":
                is_long = True
        return is_long


def server_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """What every server here has in common. No access log: its lines would carry `?api_key=`."""
    return uvicorn.Config(HearsOut(app), http=OneWrite, lifespan="off", log_config=None, access_log=False, **options)


def bind(host: str, port: int) -> socket.socket:
    """A socket to serve on. Raises CannotListen, saying why."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as problem:  # taken or foreign; no port; no host name
        listener.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {getattr(problem, 'strerror', problem)}") from problem
    return listener


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    """One more application inside a task group, until cancelled."""
    config = server_config(app, interface="asgi3", proxy_headers=False, timeout_keep_alive=75)
    await QuietServer(config).serve(sockets=[listener])


async def stop_on_signal(server: uvicorn.Server) -> None:
    """The first SIGINT or SIGTERM ends the server in order, the second at once."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            server.force_exit = server.should_exit
            server.should_exit = True

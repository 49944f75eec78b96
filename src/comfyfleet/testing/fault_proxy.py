"""A small TCP proxy that spoils connections on purpose: late, cut, reset, or answered with a server error.

It stands in front of a real server, so that a client meets real faults of a network and a service. Faults are set per
connection: `faults` is asked with the number of the connection, from 0.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.abc
from anyio.abc import SocketAttribute

_PIECE = 65536


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one connection; the default is nothing.

    delay_s: before anything is passed on. status: this answer instead of the server's, for every request. reset: closed
    at once, rudely. cut_after: closed rudely once this many bytes went to the server. bytes_per_s: speed to the server.
    """

    delay_s: float = 0.0
    status: int = 0
    reset: bool = False
    cut_after: int | None = None
    bytes_per_s: float | None = None


@dataclass
class FaultProxy:
    """A proxy that runs. `connections` counts those accepted; `to_server` the bytes passed on."""

    host: str
    port: int
    faults: Callable[[int], Fault] = field(default=lambda _: Fault())
    connections: int = 0
    to_server: int = 0
    _hold_at: int | None = None
    _held: anyio.Event = field(default_factory=anyio.Event)
    _released: anyio.Event = field(default_factory=anyio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listening}"

    listening: int = 0

    def hold(self, after: int) -> None:
        """Once so many more bytes went to the server, let nothing more through until `release`."""
        self._hold_at, self._held, self._released = self.to_server + after, anyio.Event(), anyio.Event()

    def release(self) -> None:
        self._hold_at = None
        self._released.set()

    async def until_held(self) -> None:
        """Until as many bytes went to the server as are let through."""
        await self._held.wait()

    async def let_through(self) -> None:
        """Wait at the barrier, where there is one."""
        while self._hold_at is not None and self.to_server >= self._hold_at:
            self._held.set()
            await self._released.wait()


@asynccontextmanager
async def fault_proxy(port: int, *, host: str = "127.0.0.1") -> AsyncIterator[FaultProxy]:
    """A proxy in front of `host:port`, on a free port, until the block ends."""
    proxy = FaultProxy(host=host, port=port)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    proxy.listening = listener.extra(SocketAttribute.local_port)  # noqa: S610 - no Django

    async def handle(client: anyio.abc.SocketStream) -> None:
        number, proxy.connections = proxy.connections, proxy.connections + 1
        async with client:
            await _serve(proxy, client, proxy.faults(number))

    async with listener, anyio.create_task_group() as serving:
        serving.start_soon(listener.serve, handle)
        yield proxy
        serving.cancel_scope.cancel()


async def _serve(proxy: FaultProxy, client: anyio.abc.SocketStream, fault: Fault) -> None:
    if fault.delay_s:
        await anyio.sleep(fault.delay_s)
    if fault.reset:
        _reset(client)
        return
    if fault.status:
        await _answer(client, fault.status)
        return
    try:
        async with await anyio.connect_tcp(proxy.host, proxy.port) as server, anyio.create_task_group() as both:

            async def back() -> None:
                await _pump(server, client)
                both.cancel_scope.cancel()

            both.start_soon(back)
            await _forward(proxy, client, server, fault)
            if fault.cut_after is not None:
                both.cancel_scope.cancel()
            else:
                with _broken_is_fine():
                    await server.send_eof()
    except OSError:
        return


async def _forward(
    proxy: FaultProxy, client: anyio.abc.SocketStream, server: anyio.abc.SocketStream, fault: Fault
) -> None:
    passed = 0
    with _broken_is_fine():
        async for piece in _received(client):
            if fault.bytes_per_s:
                await anyio.sleep(len(piece) / fault.bytes_per_s)
            if fault.cut_after is not None and passed + len(piece) > fault.cut_after:
                _reset(client)
                return
            await proxy.let_through()
            await server.send(piece)
            passed += len(piece)
            proxy.to_server += len(piece)


async def _pump(source: anyio.abc.SocketStream, target: anyio.abc.SocketStream) -> None:
    with _broken_is_fine():
        async for piece in _received(source):
            await target.send(piece)


async def _received(stream: anyio.abc.SocketStream) -> AsyncIterator[bytes]:
    while True:
        try:
            yield await stream.receive(_PIECE)
        except anyio.EndOfStream:
            return


async def _answer(client: anyio.abc.SocketStream, status: int) -> None:
    """The same refusal to whatever is asked on this connection, which then closes."""
    with _broken_is_fine():
        await client.receive(_PIECE)
        body = b"<Error><Code>InternalError</Code></Error>"
        head = f"HTTP/1.1 {status} Fault\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        await client.send(head.encode() + body)


def _reset(stream: anyio.abc.SocketStream) -> None:
    """Close with RST in place of FIN (SO_LINGER of zero)."""
    raw = stream.extra(SocketAttribute.raw_socket)  # noqa: S610 - no Django
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _broken_is_fine() -> contextlib.suppress:
    """A peer that went away is what this module is about."""
    return contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError)

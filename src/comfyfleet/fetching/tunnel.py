"""A door for clients that connect by themselves: a loopback proxy that goes only where the address rules allow.

obstore resolves and follows redirects on its own, so checking an endpoint before handing it over would check another
moment's answer. Through this door every connection it makes is resolved, checked and pinned here. It speaks CONNECT
(TLS stays end to end) and plain requests in absolute form; it listens on loopback and asks for a password of this
process, so nobody else on the machine can use it. Not a general proxy: one connection, one destination.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import anyio
import anyio.abc
from aiohttp.abc import AbstractResolver
from anyio.abc import SocketAttribute

from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.resolver import GuardedResolver, check_host
from comfyfleet.wire.errors import InputRefused

_HEAD_BYTES = 64 * 1024
_PIECE = 256 * 1024
_CONNECT_S = 60.0
_IDLE_S = 180.0


@asynccontextmanager
async def guarded_tunnel(
    rules: AddressRules, password: str, *, resolver: AbstractResolver | None = None
) -> AsyncIterator[str]:
    """The door's URL, to be given to a client as its proxy, until the block ends."""
    tunnel = _Tunnel(rules, GuardedResolver(rules, resolver), password)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    port = listener.extra(SocketAttribute.local_port)  # noqa: S610 - no Django
    async with listener, anyio.create_task_group() as serving:
        serving.start_soon(listener.serve, tunnel.serve, name="guarded tunnel")
        yield f"http://tunnel:{password}@127.0.0.1:{port}"
        serving.cancel_scope.cancel()


class _Tunnel:
    def __init__(self, rules: AddressRules, resolver: GuardedResolver, password: str) -> None:
        self._rules = rules
        self._resolver = resolver
        self._expected = b"Basic " + base64.b64encode(f"tunnel:{password}".encode())

    async def serve(self, client: anyio.abc.SocketStream) -> None:
        """One connection, whatever it does: its trouble stays here."""
        async with client:
            with suppress(
                anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, TimeoutError, OSError
            ):
                await self._serve(client)

    async def _serve(self, client: anyio.abc.SocketStream) -> None:
        with anyio.fail_after(_CONNECT_S):
            head, rest = await _read_head(client)
        lines = head.split(b"\r\n")
        method, _, target = lines[0].decode("latin-1").partition(" ")
        target = target.rpartition(" ")[0]
        headers = [line for line in lines[1:] if line]
        given = next((line.split(b":", 1)[1].strip() for line in headers if _name(line) == b"proxy-authorization"), b"")
        if not hmac.compare_digest(given, self._expected):
            await client.send(_refusal(407, "Proxy Authentication Required"))
            return
        split = urlsplit(f"//{target}" if method == "CONNECT" else target)
        try:
            host, port = split.hostname or "", split.port or (443 if split.scheme == "https" else 80)
            server = await self._connect(host, port)
        except (InputRefused, ValueError):
            await client.send(_refusal(403, "Forbidden"))
            return
        except (OSError, TimeoutError):
            await client.send(_refusal(502, "Bad Gateway"))
            return
        async with server:
            if method == "CONNECT":
                await client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
                if rest:
                    await server.send(rest)
            else:
                await server.send(_origin_form(lines[0], split.path, split.query, headers) + rest)
            await _join(client, server)

    async def _connect(self, host: str, port: int) -> anyio.abc.SocketStream:
        check_host(self._rules, host)
        with anyio.fail_after(_CONNECT_S):
            last: OSError = OSError("no address")
            for found in await self._resolver.resolve(host, port):
                try:
                    return await anyio.connect_tcp(found["host"], port)
                except OSError as problem:
                    last = problem
            raise last


async def _read_head(client: anyio.abc.SocketStream) -> tuple[bytes, bytes]:
    """The request's head without its blank line, and what came after it."""
    buffer = b""
    while b"\r\n\r\n" not in buffer:
        if len(buffer) > _HEAD_BYTES:
            raise OSError("the head is too long")
        buffer += await client.receive(_PIECE)
    head, _, rest = buffer.partition(b"\r\n\r\n")
    return head, rest


def _name(header: bytes) -> bytes:
    return header.split(b":", 1)[0].strip().lower()


def _origin_form(first: bytes, path: str, query: str, headers: list[bytes]) -> bytes:
    """The request as the server expects it: path only, and no word to the proxy.

    `Connection: close` keeps the promise of one destination: a second request would be one we have not read.
    """
    method, version = first.split(b" ", 1)[0], first.rsplit(b" ", 1)[1]
    target = (path or "/") + (f"?{query}" if query else "")
    kept = [line for line in headers if not _name(line).startswith(b"proxy-") and _name(line) != b"connection"]
    return (
        b"\r\n".join([method + b" " + target.encode("latin-1") + b" " + version, *kept, b"Connection: close"])
        + b"\r\n\r\n"
    )


def _refusal(status: int, reason: str) -> bytes:
    return f"HTTP/1.1 {status} {reason}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


async def _join(client: anyio.abc.SocketStream, server: anyio.abc.SocketStream) -> None:
    """Pass bytes both ways until either side is done or both are silent for too long."""
    async with anyio.create_task_group() as both:

        async def pump(source: anyio.abc.SocketStream, target: anyio.abc.SocketStream) -> None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, TimeoutError):
                while True:
                    with anyio.fail_after(_IDLE_S):
                        piece = await source.receive(_PIECE)
                    await target.send(piece)
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
                await target.send_eof()

        async def back() -> None:
            await pump(server, client)
            both.cancel_scope.cancel()  # the server said all it had to say

        both.start_soon(back)
        await pump(client, server)

"""The door goes where the rules allow and nowhere else, for plain requests and for TLS, and opens to its owner only."""

from __future__ import annotations

import base64
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import anyio
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver

from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.tunnel import guarded_tunnel

pytestmark = pytest.mark.anyio


@dataclass
class ANameServer(AbstractResolver):
    answers: dict[str, str]
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.append(host)
        if host not in self.answers:
            raise OSError("unknown")
        address = self.answers[host]
        return [{"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self) -> None: ...


@asynccontextmanager
async def a_site():
    hits = []

    async def handle(request: web.Request) -> web.Response:
        hits.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        return web.Response(text="hello")

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1], hits
    finally:
        await runner.cleanup()


async def through(door: str, head: str, body: bytes = b"", password: str | None = None) -> bytes:
    """Everything the door answers to one request."""
    parts = urlsplit(door)
    token = base64.b64encode(f"tunnel:{parts.password if password is None else password}".encode()).decode()
    request = head.format(auth=f"Proxy-Authorization: Basic {token}\r\n").encode() + body
    async with await anyio.connect_tcp("127.0.0.1", parts.port) as stream:
        await stream.send(request)
        answer = b""
        with anyio.move_on_after(5):
            try:
                while b"hello" not in answer:
                    answer += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass
        return answer


async def test_a_plain_request_arrives_in_origin_form_without_a_word_to_the_proxy() -> None:
    rules = AddressRules.parse(["s3.test"])
    async with (
        a_site() as (port, hits),
        guarded_tunnel(rules, "pw", resolver=ANameServer({"s3.test": "127.0.0.1"})) as door,
    ):
        first = f"PUT http://s3.test:{port}/b/a%20b?x=1 HTTP/1.1\r\nHost: s3.test:{port}\r\n"
        head = first + "{auth}Content-Length: 3\r\n\r\n"
        answer = await through(door, head, b"abc")

    assert answer.startswith(b"HTTP/1.1 200")
    [(method, path, headers, body)] = hits
    assert (method, path, body) == ("PUT", "/b/a%20b?x=1", b"abc")
    assert "Proxy-Authorization" not in headers
    assert headers["Connection"] == "close"


async def test_connect_passes_bytes_both_ways() -> None:
    rules = AddressRules.parse(["s3.test"])
    async with (
        a_site() as (port, hits),
        guarded_tunnel(rules, "pw", resolver=ANameServer({"s3.test": "127.0.0.1"})) as door,
    ):
        head = f"CONNECT s3.test:{port} HTTP/1.1\r\nHost: s3.test:{port}\r\n{{auth}}\r\n"
        answer = await through(door, head, b"GET /inside HTTP/1.1\r\nHost: x\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 200 Connection established")
    assert hits[0][1] == "/inside"


@pytest.mark.parametrize("request_line", ["CONNECT {host}:{port} HTTP/1.1", "GET http://{host}:{port}/ HTTP/1.1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "inner.test", "[::ffff:127.0.0.1]", "127.1", "2130706433", "[::1]", ""])
async def test_a_private_address_is_refused(request_line: str, host: str) -> None:
    async with (
        a_site() as (port, hits),
        guarded_tunnel(AddressRules(), "pw", resolver=ANameServer({"inner.test": "127.0.0.1"})) as door,
    ):
        answer = await through(door, request_line.format(host=host, port=port) + "\r\n{auth}\r\n")

    assert answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 502"))
    assert hits == []


async def test_a_stranger_on_this_machine_is_not_served() -> None:
    names = ANameServer({"s3.test": "127.0.0.1"})
    async with a_site() as (port, hits), guarded_tunnel(AddressRules.parse(["s3.test"]), "pw", resolver=names) as door:
        for password in ("", "wrong"):
            answer = await through(door, f"GET http://s3.test:{port}/ HTTP/1.1\r\n{{auth}}\r\n", password=password)
            assert answer.startswith(b"HTTP/1.1 407")

    assert hits == []
    assert names.asked == []


@pytest.mark.parametrize(
    "rubbish", [b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\xfe\r\n\r\n", b"CONNECT x:y:z HTTP/1.1\r\n\r\n", b"A" * 100_000]
)
async def test_rubbish_ends_its_own_connection_only(rubbish: bytes) -> None:
    names = ANameServer({"s3.test": "127.0.0.1"})
    async with a_site() as (port, _), guarded_tunnel(AddressRules.parse(["s3.test"]), "pw", resolver=names) as door:
        async with await anyio.connect_tcp("127.0.0.1", urlsplit(door).port) as stream:
            await stream.send(rubbish)
        answer = await through(door, f"GET http://s3.test:{port}/ HTTP/1.1\r\nHost: a\r\n{{auth}}\r\n")

    assert b"200 OK" in answer

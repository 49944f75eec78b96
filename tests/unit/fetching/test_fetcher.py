"""A download goes only where it may, takes only so much, and waits only so long; a post does not follow anybody."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyfleet.clock import SystemClock
from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.body import Decoder
from comfyfleet.fetching.fetcher import Credential, FetchLimits, GuardedFetcher
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import DiskFull, InputRefused, InputUnavailable

pytestmark = pytest.mark.anyio

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class ANameServer(AbstractResolver):
    """Answers by name; a list of answers is given out one question at a time, the last one for ever."""

    answers: dict[str, list[list[str]]]
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.append(host)
        queue = self.answers[host]
        addresses = queue.pop(0) if len(queue) > 1 else queue[0]
        return [
            {"hostname": host, "host": one, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
            for one in addresses
        ]

    async def close(self) -> None: ...


@asynccontextmanager
async def a_site(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[int]:
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def a_fetcher(names: dict[str, list[list[str]]], *allowed: str, clock=None, **limits) -> GuardedFetcher:
    return GuardedFetcher(
        AddressRules.parse(allowed),
        clock or SystemClock(),
        limits=FetchLimits(**{"connect_s": 2.0, "idle_s": 5.0, "total_s": 10.0, **limits}),
        resolver=ANameServer(names),
    )


async def hello(request: web.Request) -> web.Response:
    return web.Response(body=b"hello", headers={"ETag": '"1"'})


async def test_a_file_arrives_with_its_digest() -> None:
    async with a_site(hello) as port, a_fetcher({"cats.test": [["127.0.0.1"]]}, "cats.test") as fetcher:
        into = io.BytesIO()
        got = await fetcher.download(f"http://cats.test:{port}/a/cat.png?x=1", into)

    assert into.getvalue() == b"hello"
    assert (got.size_bytes, got.sha256, got.name) == (5, hashlib.sha256(b"hello").hexdigest(), "cat.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::1]:{port}/",
        "http://inner.test:{port}/", "http://mixed.test:{port}/", "http://2130706433:{port}/", "http://0x7f000001:{port}/",
        "http://127.1:{port}/", "http://127.0.0.1.:{port}/", "http://0177.0.0.1:{port}/", "http://0x7f.1:{port}/",
        "file:///etc/passwd", "ftp://cats.test/", "http:///x", "gopher://127.0.0.1:{port}/", "//cats.test/x", "",
    ],
)  # fmt: skip
async def test_a_private_address_is_never_reached(url: str) -> None:
    hits = []

    async def secret(request: web.Request) -> web.Response:
        hits.append(request.path)
        return web.Response(text="secret")

    names = {
        "inner.test": [["127.0.0.1"]],
        "mixed.test": [["8.8.8.8", "127.0.0.1"]],
    }
    async with a_site(secret) as port, a_fetcher(names) as fetcher:
        with pytest.raises(InputRefused):
            await fetcher.download(url.format(port=port), io.BytesIO())
        with pytest.raises(InputRefused):
            await fetcher.post(url.format(port=port), b"{}", headers={}, timeout_s=5)

    assert hits == []


async def test_a_name_that_changes_its_mind_reaches_only_what_was_checked() -> None:
    """Rebinding: the first answer is allowed, every later one is the machine's own address."""
    hits = []

    async def secret(request: web.Request) -> web.Response:
        hits.append(request.path)
        return web.Response(text="secret")

    async with a_site(hello, "127.0.0.2") as port:
        runner = web.ServerRunner(web.Server(secret))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        names = {"turncoat.test": [["127.0.0.2"], ["127.0.0.1"]]}
        async with a_fetcher(names, "127.0.0.2") as fetcher:
            into = io.BytesIO()
            await fetcher.download(f"http://turncoat.test:{port}/", into)
            assert into.getvalue() == b"hello"
            async with a_fetcher(names, "127.0.0.2") as later:
                with pytest.raises(InputRefused):
                    await later.download(f"http://turncoat.test:{port}/", io.BytesIO())
        await runner.cleanup()

    assert hits == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/secret", "http://inner.test:{port}/secret", "file:///etc/passwd"]
)
async def test_a_redirect_to_a_private_address_is_not_followed(status: int, target: str) -> None:
    hits = []

    async def turn(request: web.Request) -> web.Response:
        hits.append(request.path)
        return web.Response(status=status, headers={"Location": target.format(port=request.url.port)})

    names = {"cats.test": [["127.0.0.1"]], "inner.test": [["127.0.0.1"]]}
    async with a_site(turn) as port, a_fetcher(names, "cats.test") as fetcher:
        with pytest.raises(InputRefused):
            await fetcher.download(f"http://cats.test:{port}/start", io.BytesIO())

    assert hits == ["/start"]


async def test_redirects_end_and_relative_ones_work() -> None:
    async def turn(request: web.Request) -> web.Response:
        step = int(request.path.strip("/"))
        if step == 3:
            return web.Response(text="there")
        return web.Response(status=302, headers={"Location": f"/{step + 1 if step < 100 else 100}"})

    async with a_site(turn) as port, a_fetcher({"cats.test": [["127.0.0.1"]]}, "cats.test") as fetcher:
        into = io.BytesIO()
        await fetcher.download(f"http://cats.test:{port}/0", into)
        assert into.getvalue() == b"there"
        with pytest.raises(InputRefused, match="redirects"):
            await fetcher.download(f"http://cats.test:{port}/100", io.BytesIO())


async def test_credentials_stay_with_their_host_and_path() -> None:
    seen = []

    async def turn(request: web.Request) -> web.Response:
        seen.append((request.host.split(":")[0], request.path, request.headers.get("Authorization")))
        to = {"/private/a": "/open/b", "/open/b": f"http://other.test:{request.url.port}/private/c"}.get(request.path)
        return web.Response(status=302, headers={"Location": to}) if to else web.Response(text="end")

    names = {"cats.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]}
    async with a_site(turn) as port, a_fetcher(names, "cats.test", "other.test") as fetcher:
        token = Credential(url_prefix=f"http://cats.test:{port}/private", headers={"Authorization": "Bearer t"})
        await fetcher.download(f"http://cats.test:{port}/private/a", io.BytesIO(), credentials=[token])

    assert seen == [
        ("cats.test", "/private/a", "Bearer t"),
        ("cats.test", "/open/b", None),
        ("other.test", "/private/c", None),
    ]
    assert "Bearer" not in repr(token)


@pytest.mark.parametrize("declared", [True, False])
async def test_a_file_over_the_limit_is_cut_off(declared: bool) -> None:
    async def much(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "100000"} if declared else {})
        await answer.prepare(request)
        for _ in range(100):
            await answer.write(bytes(1000))
        return answer

    into = io.BytesIO()
    async with a_site(much) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test", max_bytes=5000) as fetcher:
        with pytest.raises(InputRefused, match="5000"):
            await fetcher.download(f"http://a.test:{port}/", into)

    assert len(into.getvalue()) <= 5000


async def test_a_bomb_is_cut_off_before_it_unpacks() -> None:
    bomb = gzip.compress(bytes(50_000_000))

    async def small(request: web.Request) -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    into = io.BytesIO()
    async with a_site(small) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test", max_bytes=1_000_000) as fetcher:
        with pytest.raises(InputRefused, match="over"):
            await fetcher.download(f"http://a.test:{port}/", into)

    assert len(bomb) < 60_000
    assert len(into.getvalue()) <= 1_000_000


@given(
    plain=st.binary(max_size=3000),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
    coding=st.sampled_from(["gzip", "deflate", ""]),
)
@settings(max_examples=60)
def test_what_was_packed_is_unpacked_whatever_the_pieces(plain: bytes, cuts: list[int], coding: str) -> None:
    packed = {"gzip": gzip.compress, "deflate": zlib.compress, "": bytes}[coding](plain)
    decoder = Decoder(coding)

    edges = [0, *sorted(min(cut, len(packed)) for cut in cuts), len(packed)]
    out = b"".join(piece for start, end in itertools.pairwise(edges) for piece in decoder.feed(packed[start:end]))

    decoder.finish()
    assert out == plain


async def test_a_drip_is_too_slow() -> None:
    clock = FakeClock()

    async def drip(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(60):
            await answer.write(b"x")
            clock.jump(1.0)
            await checkpoint()
        return answer

    names = {"a.test": [["127.0.0.1"]]}
    async with a_site(drip) as port, a_fetcher(names, "a.test", clock=clock, slow_grace_s=5.0) as fetcher:
        with pytest.raises(InputUnavailable) as slow:
            await fetcher.download(f"http://a.test:{port}/", io.BytesIO())

    assert slow.value.details["reason"] in ("slow", "timeout")


@pytest.mark.parametrize(("limit", "reason"), [({"total_s": 0.2}, "timeout"), ({"idle_s": 0.2}, "connection")])
async def test_a_host_that_hangs_is_left(limit: dict[str, float], reason: str) -> None:
    done = anyio.Event()

    async def hang(request: web.Request) -> web.Response:
        await done.wait()
        return web.Response()

    async with a_site(hang) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test", **limit) as fetcher:
        with pytest.raises(InputUnavailable):
            await fetcher.download(f"http://a.test:{port}/", io.BytesIO())
        done.set()


@pytest.mark.parametrize("status", [204, 206, 400, 404, 500])
async def test_an_answer_that_is_no_file_says_its_status(status: int) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with a_site(refuse) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test") as fetcher:
        with pytest.raises(InputUnavailable) as refusal:
            await fetcher.download(f"http://a.test:{port}/", io.BytesIO())

    assert refusal.value.details["status"] == status


async def test_a_broken_off_file_is_no_file() -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b"x" * 10)
        request.transport.close()
        return answer

    async with a_site(cut) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test") as fetcher:
        with pytest.raises(InputUnavailable):
            await fetcher.download(f"http://a.test:{port}/", io.BytesIO())


async def test_a_known_file_is_asked_about_not_assumed() -> None:
    async def maybe(request: web.Request) -> web.Response:
        return web.Response(status=304) if request.headers.get("If-None-Match") == '"1"' else await hello(request)

    async with a_site(maybe) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test") as fetcher:
        first = await fetcher.download(f"http://a.test:{port}/", io.BytesIO())
        second = await fetcher.download(f"http://a.test:{port}/", io.BytesIO(), if_none_match=first.etag)

    assert (first.etag, first.not_modified, second.not_modified) == ('"1"', False, True)


async def test_a_post_tells_what_was_answered_and_follows_nobody() -> None:
    bodies = []

    async def receive(request: web.Request) -> web.Response:
        bodies.append((request.path, await request.read(), request.headers["X-Test"]))
        headers = {"Location": "/elsewhere", "Retry-After": "7"}
        return web.Response(status=307, headers=headers, text="x" * 5000)

    async with a_site(receive) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test") as fetcher:
        posted = await fetcher.post(f"http://a.test:{port}/hook", b"body", headers={"X-Test": "1"}, timeout_s=5)

    assert bodies == [("/hook", b"body", "1")]
    assert (posted.status, posted.retry_after_s, len(posted.excerpt)) == (307, 7.0, 1024)


async def test_a_full_disk_is_not_the_hosts_fault() -> None:
    async with a_site(hello) as port, a_fetcher({"a.test": [["127.0.0.1"]]}, "a.test") as fetcher:
        with io.FileIO("/dev/full", "w") as full_disk, pytest.raises(DiskFull):
            await fetcher.download(f"http://a.test:{port}/", full_disk)

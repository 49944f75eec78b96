"""The short way to an engine, against servers that answer as they like."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio
import pytest

from comfyfleet.worker.engines.line import Line, LineBroken

pytestmark = pytest.mark.anyio

FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@asynccontextmanager
async def a_server(*connections):
    """Each connection gets a list of answers, one a request, and is closed after the last, `...` keeps it open."""
    heard, waiting = [], list(connections)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")

    async def serve(stream):
        answers = waiting.pop(0)
        async with stream:
            for answer in answers:
                if answer is ...:
                    await anyio.sleep_forever()
                heard.append(await stream.receive())
                await stream.send(answer)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        line = Line(f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}/base/")
        with anyio.fail_after(5):
            yield line, heard
        line.close()
        tasks.cancel_scope.cancel()
    await listener.aclose()


async def test_calls_share_a_connection_and_say_what_they_send():
    async with a_server([FINE, FINE, ...]) as (line, heard):
        assert await line.call("POST", "/prompt", b"{}") == (200, b"hi")
        assert await line.call("GET", "/queue") == (200, b"hi")

    assert heard[0].startswith(b"POST /base/prompt HTTP/1.1\r\nHost: 127.0.0.1:")
    assert heard[0].endswith(b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
    assert heard[1].startswith(b"GET /base/queue HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nold", b"old"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + FINE, b"hi"),
    ],
)
async def test_every_way_to_end_a_body(answer, body):
    async with a_server([answer], [FINE]) as (line, _):
        assert await line.call("GET", "/a") == (200, body)
        assert await line.call("GET", "/b") == (200, b"hi")


async def test_a_kept_connection_that_was_closed_is_no_failure_of_a_reading():
    async with a_server([FINE, b""], [FINE]) as (line, heard):
        await line.call("GET", "/a")
        assert await line.call("GET", "/b") == (200, b"hi")
        assert len(heard) == 3


async def test_a_prompt_is_never_sent_twice():
    async with a_server([FINE, b""], [FINE]) as (line, heard):
        await line.call("GET", "/a")
        with pytest.raises(LineBroken):
            await line.call("POST", "/prompt", b"{}")
        assert len(heard) == 2


@pytest.mark.parametrize("answer", [b"no http\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_half_an_answer_is_none(answer):
    async with a_server([answer]) as (line, _):
        with pytest.raises(LineBroken):
            await line.call("GET", "/a")


async def test_whoever_gives_up_leaves_no_answer_to_the_next():
    async with a_server([FINE, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", ...], [FINE]) as (line, _):
        await line.call("GET", "/a")
        with anyio.move_on_after(0.05):
            await line.call("GET", "/slow")
        assert await line.call("GET", "/b") == (200, b"hi")


def test_what_needs_a_general_client_is_left_to_it():
    assert Line.reaches("http://127.0.0.1:8188")
    for url in ("https://engine.example", "http://user:word@engine.example", "http://engine.example?key=1", "engine"):
        assert not Line.reaches(url)

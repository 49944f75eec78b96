"""What a server writes in one turn leaves together, and whoever is refused in the middle of a body reads why."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from starlette.responses import PlainTextResponse

from comfyfleet.listening import GatheredWrites, bind, serve

pytestmark = pytest.mark.anyio


class Wire(asyncio.Transport):
    """Keeps what left, one entry for each system call it would have been."""

    def __init__(self) -> None:
        self.left: list[bytes] = []
        self.is_closed = False

    def writelines(self, pieces):
        assert not self.is_closed
        self.left.append(b"".join(pieces))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
async def writes(wire):
    return GatheredWrites(wire, asyncio.get_running_loop())


async def test_a_head_and_its_body_leave_as_one(wire, writes):
    writes.write(b"head,")
    writes.write(b"body")
    assert wire.left == []

    await anyio.wait_all_tasks_blocked()

    assert wire.left == [b"head,body"]


async def test_what_is_written_in_a_later_turn_is_not_waited_for(wire, writes):
    writes.write(b"an event")
    await anyio.wait_all_tasks_blocked()
    writes.write(b"another")
    await anyio.wait_all_tasks_blocked()

    assert wire.left == [b"an event", b"another"]


async def test_a_connection_that_is_closed_has_said_all(wire, writes):
    writes.write(b"the last word")
    writes.close()
    await anyio.wait_all_tasks_blocked()

    assert wire.left == [b"the last word"]
    assert wire.is_closed


async def test_much_leaves_at_once_so_that_a_slow_reader_is_felt(wire, writes):
    writes.write(b"head,")
    writes.write(bytes(GatheredWrites.MOST_BYTES))
    assert len(wire.left) == 1

    writes.write(b"tail")
    await anyio.wait_all_tasks_blocked()

    assert b"".join(wire.left) == b"head," + bytes(GatheredWrites.MOST_BYTES) + b"tail"


@pytest.mark.parametrize("framing", ["Content-Length: 16000000", "Transfer-Encoding: chunked"])
async def test_who_is_refused_in_the_middle_of_a_long_body_may_finish_it_and_reads_why(framing):
    async def app(scope, receive, send):
        await PlainTextResponse("too long", 413)(scope, receive, send)  # without one look at the body

    body = bytes(16_000_000) if "Length" in framing else b"f42400\r\n" + bytes(16_000_000) + b"\r\n0\r\n\r\n"
    answer = b""
    with bind("127.0.0.1", 0) as listener:
        async with anyio.create_task_group() as group:
            group.start_soon(serve, app, listener)
            async with await anyio.connect_tcp(*listener.getsockname()) as stream:
                await stream.send(
                    f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{framing}\r\n\r\n".encode() + body
                )
                async for piece in stream:
                    answer += piece
            group.cancel_scope.cancel()

    assert answer.startswith(b"HTTP/1.1 413")
    assert answer.endswith(b"too long")

"""What a server writes in one turn of the event loop leaves together, in order, and never piles up."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from comfyfleet.listening import GatheredWrites

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

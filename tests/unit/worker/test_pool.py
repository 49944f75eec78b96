"""Which engine gets a prompt: one that can work, and of those never one that is about to be ended."""

from __future__ import annotations

import aiohttp
import anyio
import pytest
from anyio.lowlevel import checkpoint

from comfyfleet.ids import SystemIds
from comfyfleet.worker.engines.client import EngineClient
from comfyfleet.worker.engines.faults import FaultKind
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot, EngineState


@pytest.fixture
async def slots(clock):
    async with aiohttp.ClientSession() as session:
        yield [
            EngineSlot(
                name=name,
                client=EngineClient("http://127.0.0.1:9", session=session, clock=clock, ids=SystemIds()),
                owned=True,
                folders={},
                state=EngineState.READY,
            )
            for name in ("one", "two")
        ]


@pytest.mark.anyio
async def test_a_poisoned_engine_gets_no_work_from_the_moment_its_restart_is_wanted(slots, clock):
    pool = EnginePool(slots, clock)
    one, two = slots
    one.want_restart(FaultKind.DEVICE)

    assert await pool.acquire("first", 1.0) is two
    assert await pool.acquire("second", 1.0, avoid=frozenset({"two"})) is two


@pytest.mark.anyio
async def test_a_prompt_waits_for_the_new_process_of_the_only_engine(slots, clock):
    (one, _), pool = slots, EnginePool(slots[:1], clock)
    one.want_restart(FaultKind.DEVICE)
    got = []

    async def ask() -> None:
        got.append(await pool.acquire("again", 1.0, avoid=frozenset({"one"})))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await checkpoint()
        await checkpoint()
        assert got == []
        one.restart_wanted, one.restart_kind = anyio.Event(), None  # as the supervisor does with each new process
        pool.wake()
    assert got == [one]

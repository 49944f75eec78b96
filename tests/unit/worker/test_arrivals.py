"""A job that is just being written to the journal: what repeats, cancels and the queue's limit make of it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace

import anyio
import pytest

from comfyfleet.ids import SeededIds
from comfyfleet.sealing import Sealer
from comfyfleet.settings.worker import QueueSettings
from comfyfleet.wire.errors import DiskFull, QueueFull
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.engines.learned import Durations
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot, EngineState
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.service import JobService
from comfyfleet.worker.templates import Templates

pytestmark = pytest.mark.anyio


class SlowJournal(Journal):
    """Takes a new job when it is let, or says that the disk is full."""

    def __init__(self, folder) -> None:
        super().__init__(folder / "journal.sqlite3", Sealer(b"k" * 32, "journal"))
        self.asked, self.let = anyio.Event(), anyio.Event()
        self.is_full = False

    async def accept(self, job) -> None:
        self.asked.set()
        await self.let.wait()
        if self.is_full:
            self.is_full = False
            raise OSError("no space left on device")
        await super().accept(job)


async def done_when(is_so) -> None:
    """The journal writes in a thread of its own."""
    while not is_so():  # noqa: ASYNC110 - nothing tells
        await anyio.sleep(0.001)


def a_request(request_id: str = "") -> GenerateInput:
    return GenerateInput(request_id=request_id, workflow_json={"1": {"class_type": "A", "inputs": {}}})


@asynccontextmanager
async def a_service(tmp_path, clock, *, limit: int = 10, begin_at_most: int | None = None):
    """A service without engines: jobs are accepted, begin, and wait."""

    async def never(*_given):
        await anyio.sleep_forever()

    async def told(*_given):
        return None

    stages = SimpleNamespace(check=lambda _request: None, fetch_inputs=never, notify=told)
    journal = SlowJournal(tmp_path)
    service = JobService(
        pool=EnginePool([], clock),
        stages=stages,
        journal=journal,
        templates=Templates(),
        settings=QueueSettings(max_queue_size=limit, result_ttl_s=60.0),
        durations=Durations(),
        clock=clock,
        ids=SeededIds(1),
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(service.run)
        with anyio.fail_after(60):
            yield service, journal, tasks
        tasks.cancel_scope.cancel()


async def test_a_repeat_of_a_job_that_the_disk_did_not_take_is_a_job_of_its_own(tmp_path, clock):
    async with a_service(tmp_path, clock) as (service, journal, tasks):
        journal.is_full, joined = True, []

        async def first() -> None:
            with pytest.raises(DiskFull):
                await service.submit(a_request("twice"))

        async def again() -> None:
            joined.append(await service.submit(a_request("twice")))

        tasks.start_soon(first)
        await journal.asked.wait()
        tasks.start_soon(again)
        await anyio.wait_all_tasks_blocked()
        assert joined == [], "nobody is told that it was accepted before it is on the disk"
        journal.let.set()
        await done_when(lambda: joined)

        assert service.by_key("", "twice") is joined[0]
        assert joined[0].status is not RunStatus.FAILED
        assert not joined[0].done.is_set()


async def test_a_repeat_joins_once_the_job_is_on_the_disk(tmp_path, clock):
    async with a_service(tmp_path, clock) as (service, journal, tasks):
        found = []

        async def submit() -> None:
            found.append(await service.submit(a_request("twice")))

        for _ in range(3):
            tasks.start_soon(submit)
        await journal.asked.wait()
        journal.let.set()
        await done_when(lambda: len(found) == 3)

        assert found[0] is found[1] is found[2]


async def test_jobs_that_are_being_written_count_against_the_queues_limit(tmp_path, clock):
    async with a_service(tmp_path, clock, limit=2) as (service, journal, tasks):
        for _ in range(2):
            tasks.start_soon(service.submit, a_request())
        await anyio.wait_all_tasks_blocked()

        with pytest.raises(QueueFull):
            await service.submit(a_request())
        journal.let.set()
        await done_when(lambda: service.queue_view().waiting == 2)


async def test_a_job_cancelled_while_it_is_written_ends_at_once_and_waits_behind_nobody(tmp_path, clock):
    async with a_service(tmp_path, clock) as (service, journal, tasks):
        journal.let.set()
        for _ in range(4):  # as many as begin ahead, and one that waits
            await service.submit(a_request())
        journal.let, journal.asked = anyio.Event(), anyio.Event()
        tasks.start_soon(service.submit, a_request("unwanted"))
        await journal.asked.wait()
        ended = []

        async def cancel() -> None:
            ended.append(await service.cancel("unwanted"))

        tasks.start_soon(cancel)
        await anyio.wait_all_tasks_blocked()
        journal.let.set()
        await done_when(lambda: ended)

        assert ended[0].status is RunStatus.CANCELLED


async def test_whoever_waits_for_an_engine_longest_gets_the_next_one(tmp_path, clock):
    slot = EngineSlot(name="e", client=None, owned=True, folders={}, state=EngineState.READY)
    pool = EnginePool([slot], clock)
    order: list[str] = []

    async def wait(name: str) -> None:
        await pool.acquire(name, 100.0)
        order.append(name)

    async with anyio.create_task_group() as tasks:
        await pool.acquire("runs", 100.0)
        await pool.acquire("behind it", 100.0)
        tasks.start_soon(wait, "first")
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(wait, "second")
        pool.release(slot, "runs")  # it is the first one's turn, and before it can run another has the room
        await pool.acquire("in between", 100.0)
        await anyio.wait_all_tasks_blocked()
        for gone in ("behind it", "in between"):
            pool.release(slot, gone)
            await anyio.wait_all_tasks_blocked()

    assert order == ["first", "second"]

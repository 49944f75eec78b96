"""An operator reads every line that was written before he asked."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from comfyfleet.control.logbook import Logbook
from comfyfleet.control.store.store import open_sqlite

pytestmark = pytest.mark.anyio


class SlowStore:
    """A real store whose saving of lines waits at a gate."""

    def __init__(self, store):
        self._store = store
        self.saving, self.gate = anyio.Event(), anyio.Event()

    async def add_logs(self, rows):
        self.saving.set()
        await self.gate.wait()
        await self._store.add_logs(rows)

    async def logs(self, **which):
        return await self._store.logs(**which)


async def test_a_line_that_is_being_saved_when_somebody_reads_is_read(tmp_path, clock):
    real = open_sqlite(tmp_path / "control.sqlite3")
    store = SlowStore(real)
    logbook = Logbook(store, clock)
    logbook.write("info0", "max_workers: 12 -> 13", endpoint_id=1)
    read = {}

    async def ask() -> None:
        read.update(await logbook.read(endpoint_id=1, workergroup_id=None, tail=10))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(logbook.flush)
        await store.saving.wait()
        tasks.start_soon(ask)
        for _ in range(5):
            await checkpoint()
        store.gate.set()
    assert "max_workers: 12 -> 13" in read["info0"]
    await real.close()

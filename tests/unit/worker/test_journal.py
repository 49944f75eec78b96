"""What the journal promises of a write: who may believe it when, and that nobody waits longer than for that."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from comfyfleet.sealing import Sealer
from comfyfleet.worker.journal import Journal

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO learned (name, data) VALUES (?, ?)"
FOUND = "SELECT name FROM learned ORDER BY name"


@pytest.fixture
async def journal(tmp_path: Path):
    journal = Journal(tmp_path / "journal.sqlite3", Sealer(b"k" * 32, "journal"))
    yield journal
    await journal.close()


@pytest.fixture
def held_sync(monkeypatch):
    """A disk that answers no sync until it is let go; `asked` says that one is waiting."""
    asked, go, real = threading.Event(), threading.Event(), os.fsync

    def slow(handle: int) -> None:
        asked.set()
        assert go.wait(60)
        real(handle)

    monkeypatch.setattr(os, "fsync", slow)
    yield asked, go
    go.set()


def names(path: Path) -> list[str]:
    """As another process, or the next one, reads them."""
    with sqlite3.connect(path) as db:
        return [row[0] for row in db.execute(FOUND)]


async def test_a_committed_write_waits_for_no_disk_survives_this_process_and_is_synced_soon(
    journal: Journal, held_sync, tmp_path: Path
):
    asked, go = held_sync

    await journal.write(lambda db: db.execute(INSERT, ("one", b"")), durable=False)

    assert names(tmp_path / "journal.sqlite3") == ["one"]
    assert await anyio.to_thread.run_sync(asked.wait, 60)
    await journal.write(lambda db: db.execute(INSERT, ("two", b"")), durable=False)
    assert names(tmp_path / "journal.sqlite3") == ["one", "two"]
    go.set()


async def test_a_durable_write_is_told_only_after_its_sync(journal: Journal, held_sync):
    asked, go = held_sync
    told = anyio.Event()

    async def write() -> None:
        await journal.write(lambda db: db.execute(INSERT, ("one", b"")))
        told.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        assert await anyio.to_thread.run_sync(asked.wait, 60)
        assert not told.is_set()
        go.set()
        with anyio.fail_after(60):
            await told.wait()


async def test_closing_syncs_what_is_only_committed(tmp_path: Path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = Journal(tmp_path / "journal.sqlite3", Sealer(b"k" * 32, "journal"))
    await journal.write(lambda db: db.execute(INSERT, ("one", b"")), durable=False)

    await journal.close()

    assert synced

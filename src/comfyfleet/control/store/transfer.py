"""Move a whole installation: every table as lines of JSON, out of one database and into another, empty one.

In one transaction at the receiving end, so a half-read file leaves an empty database. The values are
what the tables hold (secrets stay sealed), so the receiving side needs the same `master.key`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from comfyfleet.control.store import sql
from comfyfleet.control.store.connection import Connection
from comfyfleet.control.store.migrations import LATEST, upgrade, version
from comfyfleet.control.store.sqlite import SqliteConnection

TABLES: dict[str, tuple[str, ...]] = {
    "record": ("kind", "id", "name", "body"),
    "counter": ("name", "next"),
    "decision": ("id", "endpoint_id", "at", "sentence", "inputs", "outcome"),
    "log_line": ("id", "endpoint_id", "workergroup_id", "at", "level", "text"),
    "usage": (
        "id",
        "endpoint_id",
        "workergroup_id",
        "worker_id",
        "scope",
        "kind",
        "started_at",
        "seconds",
        "price",
    ),
    "job": (*sql.JOB_COLUMNS, "webhook_state"),
    "job_event": ("job_id", "seq", "at", "kind", "data"),
}


# Each statement that is sent alone costs a round trip; all at once would have to fit into memory.
ROWS_AT_ONCE = 1000


class NotEmpty(Exception):
    """The receiving database holds something already."""


class NotAnExport(Exception):
    """The file is no export, or one of another schema."""


class _Line(msgspec.Struct):
    table: str
    row: list[Any]


def open_connection(database: str, data_dir: Path) -> Connection:
    """The database that these settings name, as the control plane would open it."""
    if database.startswith(("postgres://", "postgresql://")):
        from comfyfleet.control.store.postgres import PostgresConnection  # only here is psycopg needed

        return PostgresConnection(database)
    path = database.removeprefix("sqlite:///")
    return SqliteConnection(Path(path) if path else data_dir / "control.sqlite3")


def counts(connection: Connection) -> dict[str, int]:
    """Rows per table."""
    return {table: int(connection.rows(f"SELECT count(*) FROM {table}", {})[0][0]) for table in TABLES}  # noqa: S608


def problems(connection: Connection) -> list[str]:
    """What is wrong with the database, as sentences; nothing is changed."""
    found = []
    if (have := version(connection)) != LATEST:
        return [f"the schema is at step {have}, this version has {LATEST}: run `comfyfleet db upgrade`"]
    if isinstance(connection, SqliteConnection):
        report = connection.rows("PRAGMA integrity_check", {})
        found += [str(row[0]) for row in report if row[0] != "ok"]
    for what, statement in _CHECKS.items():
        count = int(connection.rows(statement, {})[0][0])
        if count:
            found.append(f"{count} {what}")
    return found


_CHECKS = {
    "jobs that some worker has carry no lease": """
        SELECT count(*) FROM job WHERE status IN ('leased', 'running') AND lease_token IS NULL""",
    "jobs carry a lease although no worker has them": """
        SELECT count(*) FROM job WHERE status NOT IN ('leased', 'running') AND lease_token IS NOT NULL""",
    "final jobs have no end": """
        SELECT count(*) FROM job WHERE status IN ('completed', 'failed', 'cancelled') AND finished_at IS NULL""",
    "events belong to no job": """
        SELECT count(*) FROM job_event WHERE job_id NOT IN (SELECT id FROM job)""",
}


def export_lines(connection: Connection) -> Iterator[bytes]:
    """A line that says what this is, then one per row."""
    yield msgspec.json.encode({"comfyfleet_export": LATEST}) + b"\n"
    for table, columns in TABLES.items():
        for row in connection.rows(f"SELECT {', '.join(columns)} FROM {table}", {}):  # noqa: S608 - our own names
            yield msgspec.json.encode(_Line(table=table, row=list(row))) + b"\n"


def import_lines(connection: Connection, lines: Iterable[bytes]) -> int:
    """Fill an empty database, brought to the latest schema first; how many rows. Raises NotEmpty, NotAnExport."""
    upgrade(connection)
    if filled := [table for table, count in counts(connection).items() if count]:
        raise NotEmpty(f"the table {filled[0]} has rows already")
    incoming = iter(lines)
    try:
        head = msgspec.json.decode(next(incoming, b""), type=dict[str, int])
    except msgspec.DecodeError as error:
        raise NotAnExport("the first line is not that of an export") from error
    if head.get("comfyfleet_export") != LATEST:
        raise NotAnExport(f"an export of schema step {head.get('comfyfleet_export')}, this version has {LATEST}")
    count = 0
    connection.begin()
    connection.take_time()
    try:
        rows: list[dict[str, Any]] = []
        table = ""
        for line in incoming:
            entry = msgspec.json.decode(line, type=_Line)
            if entry.table != table or len(rows) == ROWS_AT_ONCE:
                _insert(connection, table, rows)
                table, rows = entry.table, []
            rows.append(dict(zip(TABLES[table], entry.row, strict=True)))
            count += 1
        _insert(connection, table, rows)
        connection.commit()
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        connection.rollback()
        raise NotAnExport(f"line {count + 2} cannot be read: {error}") from error
    except BaseException:
        connection.rollback()
        raise
    return count


def _insert(connection: Connection, table: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        columns = TABLES[table]
        names = ", ".join(f":{name}" for name in columns)
        connection.change_many(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({names})", rows)  # noqa: S608

"""What the loops ask of the job table, they ask of an index: no statement of theirs reads what it does not need."""

from __future__ import annotations

import pytest

from comfyfleet.control.store import sql
from comfyfleet.control.store.batches import statement_over
from comfyfleet.control.store.migrations import upgrade
from comfyfleet.control.store.sqlite import SqliteConnection

HOT = {
    "head": (sql.HEAD, "job_waiting"),
    "waiting": (sql.WAITING, "job_waiting"),
    "position": (sql.POSITION, "job_waiting"),
    "lease": (sql.LEASE, "sqlite_autoindex_job_1"),
    "leased": (sql.LEASED, "job_leased"),
    "overdue": (sql.OVERDUE, "job_overdue"),
    "undelivered": (sql.UNDELIVERED, "job_undelivered"),
    "webhooks due again": (sql.WEBHOOKS_DUE_AGAIN, "job_untold"),
    "untold": (sql.UNTOLD, "job_untold"),
    "repeat": (sql.JOB_BY_KEY, "job_idempotency"),
    "known": (statement_over(sql.KNOWN_IDS, 8), "sqlite_autoindex_job_1"),
    "renew": (statement_over(sql.RENEW_MANY, 8), "sqlite_autoindex_job_1"),
    "start": (statement_over(sql.START_MANY, 8), "sqlite_autoindex_job_1"),
    "finish": (statement_over(sql.FINISH_MANY, 8), "sqlite_autoindex_job_1"),
    "end waiting": (statement_over(sql.END_WAITING_MANY, 8), "sqlite_autoindex_job_1"),
    "events": (sql.EVENTS, "sqlite_autoindex_job_event_1"),
}


@pytest.fixture
def connection(tmp_path):
    connection = SqliteConnection(tmp_path / "control.sqlite3")
    upgrade(connection)
    yield connection
    connection.close()


@pytest.mark.parametrize("name", list(HOT))
def test_a_hot_statement_reads_by_its_index_and_sorts_nothing(connection, name):
    statement, index = HOT[name]
    params = dict.fromkeys(sql.PARAMETER.findall(statement), 0)

    steps = [row[3] for row in connection.rows(f"EXPLAIN QUERY PLAN {statement}", params)]

    assert any(f"INDEX {index}" in step for step in steps), steps
    assert not [step for step in steps if step.startswith("SCAN job") and "INDEX" not in step], steps
    assert not [step for step in steps if "TEMP B-TREE" in step], steps

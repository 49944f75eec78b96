"""The schema, as numbered steps. A step is never changed once released; a new one is added.

Written in what SQLite and PostgreSQL share: BIGINT, DOUBLE PRECISION, TEXT, partial indexes, ON CONFLICT, RETURNING.
"""

from __future__ import annotations

from comfyfleet.control.store.connection import Connection

MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        """CREATE TABLE record (
             kind TEXT NOT NULL, id TEXT NOT NULL, name TEXT, body TEXT NOT NULL, PRIMARY KEY (kind, id))""",
        "CREATE UNIQUE INDEX record_name ON record (kind, name) WHERE name IS NOT NULL",
        "CREATE TABLE counter (name TEXT PRIMARY KEY, next BIGINT NOT NULL)",
        """CREATE TABLE decision (
             id BIGINT PRIMARY KEY, endpoint_id BIGINT NOT NULL, at DOUBLE PRECISION NOT NULL,
             sentence TEXT NOT NULL, inputs TEXT NOT NULL, outcome TEXT NOT NULL)""",
        "CREATE INDEX decision_endpoint ON decision (endpoint_id, id)",
        """CREATE TABLE log_line (
             id BIGINT PRIMARY KEY, endpoint_id BIGINT NOT NULL, workergroup_id BIGINT NOT NULL,
             at DOUBLE PRECISION NOT NULL, level TEXT NOT NULL, text TEXT NOT NULL)""",
        "CREATE INDEX log_line_endpoint ON log_line (endpoint_id, id)",
        "CREATE INDEX log_line_workergroup ON log_line (workergroup_id, id)",
        """CREATE TABLE usage (
             id BIGINT PRIMARY KEY, endpoint_id BIGINT NOT NULL, workergroup_id BIGINT NOT NULL,
             worker_id BIGINT NOT NULL, scope TEXT NOT NULL, kind TEXT NOT NULL, started_at DOUBLE PRECISION NOT NULL,
             seconds DOUBLE PRECISION NOT NULL, price DOUBLE PRECISION NOT NULL)""",
        "CREATE INDEX usage_time ON usage (started_at)",
        """CREATE TABLE job (
             id TEXT PRIMARY KEY, endpoint_id BIGINT NOT NULL, scope TEXT NOT NULL, status TEXT NOT NULL,
             priority BIGINT NOT NULL, cost DOUBLE PRECISION NOT NULL, rank DOUBLE PRECISION NOT NULL,
             created_at DOUBLE PRECISION NOT NULL, not_before DOUBLE PRECISION NOT NULL, deadline_at DOUBLE PRECISION,
             idempotency_key TEXT, digest TEXT NOT NULL, shape TEXT NOT NULL, models TEXT NOT NULL,
             input TEXT NOT NULL, sealed TEXT NOT NULL, metadata TEXT NOT NULL, webhook TEXT NOT NULL,
             webhook_state TEXT NOT NULL, attempts BIGINT NOT NULL, lost_workers TEXT NOT NULL, lease_token TEXT,
             lease_expires DOUBLE PRECISION, worker_id BIGINT, worker_url TEXT, request_idx BIGINT,
             cancel_requested BIGINT NOT NULL, started_at DOUBLE PRECISION, finished_at DOUBLE PRECISION,
             result TEXT, error TEXT)""",
        "CREATE INDEX job_waiting ON job (endpoint_id, scope, rank, id, cost, created_at) WHERE status = 'queued'",
        "CREATE INDEX job_leased ON job (id) WHERE status IN ('leased', 'running')",
        "CREATE INDEX job_overdue ON job (deadline_at) WHERE status = 'queued' AND deadline_at IS NOT NULL",
        "CREATE UNIQUE INDEX job_idempotency ON job (scope, idempotency_key) WHERE idempotency_key IS NOT NULL",
        "CREATE INDEX job_created ON job (created_at, id)",
        "CREATE INDEX job_undelivered ON job (id) WHERE webhook_state = 'due'",
        "CREATE INDEX job_finished ON job (finished_at) WHERE finished_at IS NOT NULL",
        """CREATE TABLE job_event (
             job_id TEXT NOT NULL, seq BIGINT NOT NULL, at DOUBLE PRECISION NOT NULL, kind TEXT NOT NULL,
             data TEXT NOT NULL, PRIMARY KEY (job_id, seq))""",
    ),
    2: (
        """CREATE TABLE replica (
             id TEXT PRIMARY KEY, url TEXT NOT NULL, fleet TEXT NOT NULL, expires_at DOUBLE PRECISION NOT NULL)""",
        """CREATE TABLE ownership (
             endpoint_id BIGINT PRIMARY KEY, replica_id TEXT NOT NULL, fence BIGINT NOT NULL)""",
    ),
    3: ("CREATE INDEX job_untold ON job (endpoint_id) WHERE webhook_state IN ('due', 'out')",),
    4: (
        """CREATE TABLE scope_use (
             scope TEXT PRIMARY KEY, requests DOUBLE PRECISION NOT NULL, seconds DOUBLE PRECISION NOT NULL)""",
    ),
}
LATEST = max(MIGRATIONS)


class SchemaTooNew(Exception):
    """A newer comfyfleet wrote this database; an older one must not touch it."""


def version(connection: Connection) -> int:
    """The number of the last step that was applied; 0 for an empty database."""
    connection.change("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)", {})
    rows = connection.rows("SELECT max(version) FROM schema_version", {})
    return int(rows[0][0] or 0)


def upgrade(connection: Connection) -> list[int]:
    """Apply the missing steps, each whole or not at all; returns their numbers. Raises SchemaTooNew."""
    connection.begin_exclusive()
    try:
        applied = version(connection)
        if applied > LATEST:
            raise SchemaTooNew(f"schema {applied}, this version knows {LATEST}")
        missing = [number for number in sorted(MIGRATIONS) if number > applied]
        for number in missing:
            for statement in MIGRATIONS[number]:
                connection.change(statement, {})
            connection.change("INSERT INTO schema_version (version) VALUES (:version)", {"version": number})
        connection.commit()
    except BaseException:
        connection.rollback()
        raise
    return missing

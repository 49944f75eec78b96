"""PostgreSQL through psycopg: `--database postgresql://…`. Same statements, same writer, same contract.

A lost connection is opened again; the group in flight then fails with ConnectionLost, and its callers decide (an HTTP
caller gets a 503 with Retry-After, a loop tries again).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import psycopg

from comfyfleet.control.store.connection import ConnectionLost, Params, Row
from comfyfleet.control.store.news import CHANNEL
from comfyfleet.control.store.sql import PARAMETER

# Any number that is ours alone: one migration at a time per database.
_MIGRATION_LOCK = 0x636F6D66
_TELL = f"SELECT pg_notify('{CHANNEL}', :payload)"
# A process that is stopped inside a transaction would hold its rows, and the other replicas, for as long as that lasts:
# the server ends it before the stopped one's lease is over (`control.ownership`).
_IDLE_IN_TRANSACTION_MS = 2500
# One that is stopped while it sends a pipeline is not idle to the server; from PostgreSQL 17 on this ends it, too.
_TRANSACTION_MS = 4000
_COLLISIONS = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)
_LOST = (
    psycopg.OperationalError,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.TransactionTimeout,
)


@lru_cache(maxsize=256)
def _translated(statement: str) -> str:
    """`:name` in psycopg's form; types are inferred by the server, so untyped NULLs are fine."""
    return PARAMETER.sub(r"%(\1)s", statement.replace("%", "%%"))


class PostgresConnection:
    """One connection, opened again after a loss."""

    now = "extract(epoch FROM clock_timestamp())::double precision"  # not the transaction's beginning
    share_lock = " FOR SHARE"

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        self._url = url
        self._read_only = read_only
        self._raw: psycopg.Connection[Row] | None = None
        self._is_in_transaction = False

    def is_collision(self, error: Exception) -> bool:
        return isinstance(error, _COLLISIONS)

    def rows(self, statement: str, params: Params) -> list[Row]:
        try:
            return self._connected().execute(_translated(statement), params).fetchall()
        except _LOST as error:
            raise self._lost(error) from error

    def change(self, statement: str, params: Params) -> int:
        try:
            return self._connected().execute(_translated(statement), params or None).rowcount
        except _LOST as error:
            raise self._lost(error) from error

    def changes(self, statements: Sequence[tuple[str, Params]]) -> int:
        return sum(cursor.rowcount for cursor in self._pipelined(statements))

    def all_rows(self, statements: Sequence[tuple[str, Params]]) -> list[Row]:
        return [row for cursor in self._pipelined(statements) for row in cursor.fetchall()]

    def change_many(self, statement: str, params: Sequence[Params]) -> None:
        try:
            with self._connected().cursor() as cursor:
                cursor.executemany(_translated(statement), params)
        except _LOST as error:
            raise self._lost(error) from error

    def tell(self, payloads: Sequence[str]) -> None:
        self.all_rows([(_TELL, {"payload": payload}) for payload in payloads])

    def begin(self) -> None:
        self.change("BEGIN", {})
        self._is_in_transaction = True

    def begin_exclusive(self) -> None:
        self.begin()
        self.take_time()
        self.rows(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})", {})

    def take_time(self) -> None:
        self.change("SET LOCAL idle_in_transaction_session_timeout = 0", {})
        if self._has_limit():
            self.change("SET LOCAL transaction_timeout = 0", {})

    def _has_limit(self) -> bool:
        return self._raw is not None and self._raw.info.server_version >= 170000

    def commit(self) -> None:
        self.change("COMMIT", {})
        self._is_in_transaction = False

    def rollback(self) -> None:
        self._is_in_transaction = False
        if self._raw is not None and not self._raw.closed:
            try:
                self._raw.execute("ROLLBACK")
            except _LOST as error:
                self._lost(error)

    def close(self) -> None:
        if self._raw is not None:
            self._raw.close()
            self._raw = None

    def _pipelined(self, statements: Sequence[tuple[str, Params]]) -> list[psycopg.Cursor[Row]]:
        """All sent before the first answer is awaited."""
        try:
            raw = self._connected()
            if len(statements) == 1:
                return [raw.execute(_translated(statement), params) for statement, params in statements]
            with raw.pipeline():
                return [raw.execute(_translated(statement), params) for statement, params in statements]
        except _LOST as error:
            raise self._lost(error) from error

    def _connected(self) -> psycopg.Connection[Row]:
        if self._raw is None or self._raw.closed:
            if self._is_in_transaction:
                raise ConnectionLost("the connection was lost inside a transaction")
            self._raw = psycopg.connect(self._url, autocommit=True, connect_timeout=5)
            if self._read_only:
                self._raw.execute("SET default_transaction_read_only = on")
            else:
                self._raw.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_IN_TRANSACTION_MS}")
                if self._has_limit():
                    self._raw.execute(f"SET transaction_timeout = {_TRANSACTION_MS}")
        return self._raw

    def _lost(self, error: psycopg.Error) -> ConnectionLost:
        if self._raw is not None:
            self._raw.close()
            self._raw = None
        return ConnectionLost(str(error))

"""SQLite: the default. WAL, and `synchronous=FULL`, so that what was accepted survives loss of power."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from comfyfleet.control.store.connection import Params, Row


class SqliteConnection:
    """A connection to one file."""

    now = "((julianday('now') - 2440587.5) * 86400.0)"
    share_lock = ""  # one writer at a time: nothing changes under a transaction

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._raw = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
        self._raw.execute("PRAGMA journal_mode=WAL")
        self._raw.execute("PRAGMA synchronous=FULL")
        self._raw.execute("PRAGMA cache_size=-65536")
        self._raw.execute("PRAGMA temp_store=MEMORY")
        if read_only:
            self._raw.execute("PRAGMA query_only=ON")
        else:
            path.chmod(0o600)

    def is_collision(self, error: Exception) -> bool:
        del error
        return False

    def rows(self, statement: str, params: Params) -> list[Row]:
        return self._raw.execute(statement, params).fetchall()

    def change(self, statement: str, params: Params) -> int:
        return self._raw.execute(statement, params).rowcount

    def changes(self, statements: Sequence[tuple[str, Params]]) -> int:
        return sum(self._raw.execute(statement, params).rowcount for statement, params in statements)

    def all_rows(self, statements: Sequence[tuple[str, Params]]) -> list[Row]:
        return [row for statement, params in statements for row in self._raw.execute(statement, params)]

    def change_many(self, statement: str, params: Sequence[Params]) -> None:
        self._raw.executemany(statement, params)

    def tell(self, payloads: Sequence[str]) -> None:
        """Nobody else is here."""

    def begin(self) -> None:
        self._raw.execute("BEGIN IMMEDIATE")

    def begin_exclusive(self) -> None:
        self._raw.execute("BEGIN EXCLUSIVE")

    def take_time(self) -> None:
        """It may anyway."""

    def commit(self) -> None:
        self._raw.execute("COMMIT")

    def rollback(self) -> None:
        if self._raw.in_transaction:
            self._raw.execute("ROLLBACK")

    def close(self) -> None:
        self._raw.close()

"""One database connection, reduced to what the store needs. Used by one thread at a time.

Statements carry named parameters (`:name`); both databases get the same text from `sql`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Params = Mapping[str, Any]
Row = tuple[Any, ...]


class ConnectionLost(Exception):
    """The database went away; what was in flight was not committed as far as we know."""


class Connection(Protocol):
    """Two implementations: `sqlite.SqliteConnection` and `postgres.PostgresConnection`.

    now: the database's clock as an expression, epoch seconds. share_lock: ends a SELECT whose rows must not change
    before the transaction ends.
    """

    @property
    def now(self) -> str: ...

    @property
    def share_lock(self) -> str: ...

    def is_collision(self, error: Exception) -> bool:
        """Whether another process' change came in between: the same again sees it, and may go through."""
        ...

    def rows(self, statement: str, params: Params) -> list[Row]:
        """Run and fetch all."""
        ...

    def change(self, statement: str, params: Params) -> int:
        """Run; how many rows changed."""
        ...

    def changes(self, statements: Sequence[tuple[str, Params]]) -> int:
        """Run them, in as few round trips as possible; how many rows changed in all."""
        ...

    def all_rows(self, statements: Sequence[tuple[str, Params]]) -> list[Row]:
        """Run them, in as few round trips as possible; the rows of all."""
        ...

    def change_many(self, statement: str, params: Sequence[Params]) -> None: ...

    def tell(self, payloads: Sequence[str]) -> None:
        """Outside a transaction: to the other processes at this database, where there can be any."""
        ...

    def begin(self) -> None: ...

    def begin_exclusive(self) -> None:
        """A transaction that no other process shares: for migrations."""
        ...

    def take_time(self) -> None:
        """The transaction that has begun may take as long as it needs: for work on many rows."""
        ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...

    def close(self) -> None: ...

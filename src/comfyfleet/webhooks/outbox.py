"""What is still to be told, on disk: events with their next attempt, and a log of every attempt made.

SQLite in a file of its own (mode 0600); calls block for about a millisecond, so callers run them in a thread. The URL
and the secrets are sealed: a copy of the file tells nobody where or with what key. An event's id is unique: adding it
again changes nothing, so a restart may add what it is not sure of.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec

from comfyfleet.durable_file import durable_file
from comfyfleet.sealing import CannotOpen, Sealer

_SCHEMA = """
CREATE TABLE IF NOT EXISTS webhook_event (
    id TEXT PRIMARY KEY, scope TEXT NOT NULL, job TEXT NOT NULL, event TEXT NOT NULL, host TEXT NOT NULL,
    sealed BLOB NOT NULL, body BLOB NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL,
    created_at REAL NOT NULL, next_at REAL NOT NULL, ended_at REAL, reason TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS webhook_due ON webhook_event (state, next_at);
CREATE INDEX IF NOT EXISTS webhook_job ON webhook_event (scope, job);
CREATE TABLE IF NOT EXISTS webhook_delivery (
    event_id TEXT NOT NULL REFERENCES webhook_event (id) ON DELETE CASCADE, attempt INTEGER NOT NULL,
    at REAL NOT NULL, took_s REAL NOT NULL, status INTEGER, reason TEXT NOT NULL, excerpt TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS delivery_event ON webhook_delivery (event_id);
"""

# add: an id that is there already stays as it is.
_ADD = """
INSERT OR IGNORE INTO webhook_event
    (id, scope, job, event, host, sealed, body, state, attempts, created_at, next_at, reason)
VALUES (?, ?, ?, ?, ?, ?, ?, 'waiting', 0, ?, ?, '')
"""
# due: waiting events whose time has come, oldest promise first.
_DUE = (
    "SELECT * FROM webhook_event WHERE state = 'waiting' AND next_at <= ?"
    " AND host NOT IN (SELECT value FROM json_each(?)) ORDER BY next_at LIMIT ?"
)
# state: of one event.
_STATE = "SELECT state FROM webhook_event WHERE id = ?"
# next_at: when the loop has to wake for what is not due yet.
_NEXT = "SELECT min(next_at) FROM webhook_event WHERE state = 'waiting' AND next_at > ?"
# record: one attempt, and what follows from it.
_LOG = "INSERT INTO webhook_delivery VALUES (?, ?, ?, ?, ?, ?, ?)"
_APPLY = "UPDATE webhook_event SET state = ?, attempts = ?, next_at = ?, ended_at = ?, reason = ? WHERE id = ?"
# deliveries: of some events, by their ids.
_DELIVERIES = "SELECT * FROM webhook_delivery WHERE event_id IN (SELECT value FROM json_each(?)) ORDER BY at"
# replay: tell again, under the same id.
_REPLAY = (
    "UPDATE webhook_event SET state = 'waiting', attempts = 0, next_at = ?, ended_at = NULL"
    " WHERE id = ? AND scope = coalesce(?, scope)"
)
# prune: ended events past their time; their log goes with them.
_PRUNE = "DELETE FROM webhook_event WHERE state != 'waiting' AND ended_at < ?"


class EventState(StrEnum):
    """Where an event is. `dead`: given up, kept for a replay."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """Where to and how signed. Secret as a whole: a URL may carry a token."""

    url: str = field(repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    timeout_s: float = 30.0
    trusted: bool = False  # the operator named it, so it may be on his own network


@dataclass(frozen=True, kw_only=True)
class OutgoingEvent:
    """One event and its fate so far. `receiver` is None when it was sealed under a key that is gone."""

    id: str
    scope: str
    job: str
    event: str
    host: str
    receiver: Receiver | None
    body: bytes = field(repr=False)
    state: EventState
    attempts: int
    created_at: float
    next_at: float
    ended_at: float | None
    reason: str


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, as the delivery log shows it. `status` is None when nobody answered."""

    event_id: str
    attempt: int
    at: float
    took_s: float
    status: int | None
    reason: str
    excerpt: str


class Outbox:
    """The file. Every method is one transaction; safe from several threads."""

    def __init__(self, path: Path, sealer: Sealer) -> None:
        self._sealer = sealer
        self._lock = threading.Lock()
        self._base = durable_file(path, _SCHEMA)

    def add(
        self, identity: str, *, scope: str, job: str, event: str, host: str, receiver: Receiver, body: bytes, now: float
    ) -> bool:
        """Promise to tell. False when this id was promised before."""
        sealed = self._sealer.seal(msgspec.json.encode(receiver))
        with self._lock:
            values = (identity, scope, job, event, host, sealed, body, now, now)
            return self._base.execute(_ADD, values).rowcount == 1

    def due(self, now: float, limit: int, without: Sequence[str] = ()) -> list[OutgoingEvent]:
        """Events whose next attempt is due; none for the hosts `without`."""
        hosts = msgspec.json.encode(without).decode()
        with self._lock:
            rows = self._base.execute(_DUE, (now, hosts, limit)).fetchall()
        return [self._event(row) for row in rows]

    def state(self, identity: str) -> EventState | None:
        """Where one event is; None for one that was never promised, or is forgotten."""
        with self._lock:
            row = self._base.execute(_STATE, (identity,)).fetchone()
        return None if row is None else EventState(row[0])

    def next_at(self, now: float) -> float | None:
        """When the next attempt after `now` is due, or None with nothing waiting."""
        with self._lock:
            row = self._base.execute(_NEXT, (now,)).fetchone()
        return row[0] if row and row[0] is not None else None

    def record(self, delivery: Delivery, *, state: EventState, next_at: float) -> None:
        """Log one attempt and what follows from it."""
        ended_at = None if state is EventState.WAITING else delivery.at
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.execute(_LOG, msgspec.structs.astuple(delivery))
                self._base.execute(
                    _APPLY, (state, delivery.attempt, next_at, ended_at, delivery.reason, delivery.event_id)
                )
                self._base.execute("COMMIT")
            except BaseException:
                self._base.execute("ROLLBACK")
                raise

    def replay(self, identity: str, *, scope: str | None, now: float) -> bool:
        """Tell again under the same id, with a fresh count of attempts. False when there is no such event."""
        with self._lock:
            return self._base.execute(_REPLAY, (now, identity, scope)).rowcount == 1

    def events(
        self, *, scope: str | None, job: str = "", state: EventState | None = None, limit: int = 100
    ) -> list[OutgoingEvent]:
        """The newest events of a scope (None: of all); of one job or in one state where asked."""
        where, values = ("scope = ?", [scope]) if scope is not None else ("1", [])
        if job:
            where, values = where + " AND job = ?", [*values, job]
        if state is not None:
            where, values = where + " AND state = ?", [*values, state.value]
        query = f"SELECT * FROM webhook_event WHERE {where} ORDER BY created_at DESC LIMIT ?"  # noqa: S608
        with self._lock:
            rows = self._base.execute(query, (*values, limit)).fetchall()
        return [self._event(row) for row in rows]

    def deliveries(self, identities: Sequence[str]) -> list[Delivery]:
        """Every logged attempt for these events, oldest first."""
        with self._lock:
            rows = self._base.execute(_DELIVERIES, (msgspec.json.encode(identities).decode(),)).fetchall()
        return [Delivery(**dict(row)) for row in rows]

    def prune(self, before: float) -> int:
        """Forget what ended before a moment."""
        with self._lock:
            return self._base.execute(_PRUNE, (before,)).rowcount

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def _event(self, row: sqlite3.Row) -> OutgoingEvent:
        try:
            receiver = msgspec.json.decode(self._sealer.open(row["sealed"]), type=Receiver)
        except (CannotOpen, msgspec.MsgspecError):
            receiver = None
        plain = {name: row[name] for name in row.keys() if name not in ("sealed", "state")}  # noqa: SIM118
        return OutgoingEvent(receiver=receiver, state=EventState(row["state"]), **plain)

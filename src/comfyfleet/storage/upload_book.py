"""Long uploads that began and did not end, on disk: what a next process needs to go on with one, or to abort it.

One row an upload, written when it begins and dropped when it ends: a few writes for a file of many megabytes. Which
parts arrived is not here; the server is asked. The keys to the bucket are sealed.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec

from comfyfleet.durable_file import durable_file
from comfyfleet.sealing import CannotOpen, Sealer
from comfyfleet.settings.storage import S3Settings

_SCHEMA = """
CREATE TABLE IF NOT EXISTS upload (
    place TEXT PRIMARY KEY,
    key TEXT NOT NULL,
    upload_id TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    guarded INTEGER NOT NULL,
    began_at REAL NOT NULL,
    sealed BLOB NOT NULL
);
"""
_ADD = "INSERT OR REPLACE INTO upload VALUES (?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, kw_only=True)
class OpenUpload:
    """One upload. sha256: of the whole file. guarded: its endpoint is a stranger's. began_at: epoch s."""

    settings: S3Settings
    key: str
    upload_id: str
    sha256: str
    guarded: bool
    began_at: float


class UploadBook:
    """The file. Every method is one transaction; blocking, safe from several threads."""

    def __init__(self, path: Path, sealer: Sealer) -> None:
        self._sealer = sealer
        self._lock = threading.Lock()
        self._base = durable_file(path, _SCHEMA)

    def add(self, upload: OpenUpload) -> None:
        """It began; of one key in one bucket the latest counts."""
        sealed = self._sealer.seal(msgspec.json.encode(upload.settings))
        values = (_place(upload.settings, upload.key), upload.key, upload.upload_id, upload.sha256)
        with self._lock:
            self._base.execute(_ADD, (*values, upload.guarded, upload.began_at, sealed))

    def find(self, settings: S3Settings, key: str) -> OpenUpload | None:
        """The upload to this key of this bucket that did not end."""
        with self._lock:
            row = self._base.execute("SELECT * FROM upload WHERE place = ?", (_place(settings, key),)).fetchone()
        return None if row is None else self._opened(row)

    def all(self) -> list[OpenUpload]:
        """Every one that this key can open, oldest first."""
        with self._lock:
            rows = self._base.execute("SELECT * FROM upload ORDER BY began_at").fetchall()
        return [found for row in rows if (found := self._opened(row)) is not None]

    def remove(self, upload: OpenUpload) -> None:
        """It ended, or nobody can do anything about it."""
        with self._lock:
            self._base.execute("DELETE FROM upload WHERE upload_id = ?", (upload.upload_id,))

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def _opened(self, row: sqlite3.Row) -> OpenUpload | None:
        try:
            settings = msgspec.json.decode(self._sealer.open(row["sealed"]), type=S3Settings)
        except (CannotOpen, msgspec.MsgspecError):
            return None
        return OpenUpload(
            settings=settings,
            key=row["key"],
            upload_id=row["upload_id"],
            sha256=row["sha256"],
            guarded=bool(row["guarded"]),
            began_at=row["began_at"],
        )


def _place(settings: S3Settings, key: str) -> str:
    """One name for a key of a bucket of an endpoint, whoever's credentials lead there."""
    return hashlib.sha256("\0".join((settings.endpoint_url, settings.bucket, key)).encode()).hexdigest()

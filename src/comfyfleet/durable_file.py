"""A SQLite file for what a process must know after its death: readable by its owner alone, on disk at each commit.

Not for what is written with each job: the journal and the control plane's store gather their commits.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path


def durable_file(path: Path, schema: str) -> sqlite3.Connection:
    """Made where it is missing. Rows by name; for one thread at a time. Raises OSError, sqlite3.Error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    base.row_factory = sqlite3.Row
    base.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;" + schema)
    return base

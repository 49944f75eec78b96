"""Renders whose files are long under way to a store: written down, so that a next process stores them and renders
nothing again. Only those: for a picture the upload is over before anything could be written.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from comfyfleet.sealing import CannotOpen, Sealer
from comfyfleet.worker.engines.client import HistoryEntry
from comfyfleet.worker.job import Job
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.stages.history_files import Made, read_made

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rendered (
    prompt_id TEXT PRIMARY KEY,
    scope TEXT NOT NULL,
    key TEXT NOT NULL,
    sealed BLOB NOT NULL
);
"""
_KEEP = "INSERT OR REPLACE INTO rendered VALUES (?, ?, ?, ?)"
_FIND = "SELECT sealed FROM rendered WHERE prompt_id = ?"
# Of jobs that ended, or began again.
_PRUNE = """
DELETE FROM rendered WHERE NOT EXISTS (
    SELECT 1 FROM job WHERE job.scope = rendered.scope AND job.key = rendered.key
       AND job.prompt_id = rendered.prompt_id AND job.status = 'accepted'
)
"""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What an engine made: its history, what that names, and where the files are, by type."""

    entry: HistoryEntry
    made: Made
    folders: Mapping[str, Path]


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What is written down of it; the rest follows from the history."""

    entry: HistoryEntry
    folders: dict[str, Path]


class RenderedJobs:
    """The table, beside the journal's own. Rows go when another one comes and their job has ended."""

    def __init__(self, journal: Journal, sealer: Sealer) -> None:
        self._journal = journal
        self._sealer = sealer
        journal.create(_SCHEMA)

    async def keep(self, job: Job, rendered: Rendered) -> None:
        """The job's present prompt was rendered. Raises sqlite3.Error."""
        kept = _Kept(entry=rendered.entry, folders=dict(rendered.folders))
        plain = msgspec.json.encode(kept, enc_hook=str)
        values = (job.prompt_id, job.scope, job.key, self._sealer.seal(plain))

        def change(db: sqlite3.Connection) -> None:
            db.execute(_PRUNE)
            db.execute(_KEEP, values)

        await self._journal.write(change, durable=False)

    def find(self, job: Job) -> Rendered | None:
        """What became of the job's present prompt, if it was kept."""
        rows = self._journal.rows(_FIND, (job.prompt_id,))
        if not rows:
            return None
        try:
            plain = self._sealer.open(rows[0]["sealed"])
            kept = msgspec.json.decode(plain, type=_Kept, dec_hook=lambda kind, value: kind(value))
        except (CannotOpen, msgspec.MsgspecError):
            return None
        return Rendered(entry=kept.entry, made=read_made(kept.entry), folders=kept.folders)

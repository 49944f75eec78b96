"""What an endpoint's operator reads: lines by level, kept in the store, written in groups.

Levels grow in detail: info0 (what changed), info1 (why), trace (every decision), debug (all). Asking for a level shows
it and the ones before it. Never secrets, prompts or keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.records import LogRow
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost

LEVELS = ("info0", "info1", "trace", "debug")
FLUSH_EVERY_S = 1.0
# Of lines that a lost database does not take, the newest are kept for it.
_MOST_UNSAVED = 10_000

log = structlog.get_logger()


class Logbook:
    """Takes lines from anywhere at once, and stores them a moment later."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._unsaved: list[LogRow] = []
        self._saving = anyio.Lock()

    def write(self, level: str, text: str, *, endpoint_id: int, workergroup_id: int = 0) -> None:
        """level: one of LEVELS."""
        row = LogRow(
            endpoint_id=endpoint_id, workergroup_id=workergroup_id, at=self._clock.now(), level=level, text=text
        )
        self._unsaved.append(row)

    async def read(self, *, endpoint_id: int | None, workergroup_id: int | None, tail: int) -> dict[str, str]:
        """The newest `tail` lines of each level, as the command line's four keys, and all as `logs`."""
        await self.flush()
        # Levels share one table, so look further back than one level's tail.
        rows = await self._store.logs(
            endpoint_id=endpoint_id, workergroup_id=workergroup_id, tail=min(20_000, tail * len(LEVELS))
        )
        texts = {
            level: _text([row for row in rows if row.level in LEVELS[: depth + 1]], tail)
            for depth, level in enumerate(LEVELS)
        }
        return {**texts, "logs": texts[LEVELS[-1]]}

    async def flush(self) -> None:
        """Return when every line that was written is stored, whoever is storing it. Raises ConnectionLost."""
        async with self._saving:
            rows, self._unsaved = self._unsaved, []
            try:
                await self._store.add_logs(rows)
            except ConnectionLost:
                self._unsaved = [*rows, *self._unsaved][-_MOST_UNSAVED:]
                raise

    async def run(self) -> None:
        """The loop that saves."""
        while True:
            await self._clock.sleep(FLUSH_EVERY_S)
            try:
                await self.flush()
            except Exception:  # one iteration
                log.exception("logbook.flush_failed")


def _text(rows: Sequence[LogRow], tail: int) -> str:
    return "".join(
        f"{datetime.fromtimestamp(row.at, UTC).isoformat(timespec='milliseconds')} {row.level} {row.text}\n"
        for row in (rows[-tail:] if tail else [])
    )

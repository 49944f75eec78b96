"""Abort long uploads that nobody will go on with: their job was cancelled, failed, was forgotten, or kept its output.

What an ended job left in a bucket is unseen and billed. The book of open uploads says what there is, the journal
whether its job may still go on; a store that is away is asked again, less and less often (`retry.DAYS`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import anyio.to_thread
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.retry import DAYS
from comfyfleet.storage.base import StorageFailed
from comfyfleet.storage.long_uploads import LongUploads
from comfyfleet.storage.upload_book import OpenUpload

log = structlog.get_logger()

LOOK_EVERY_S = 5.0


@dataclass(kw_only=True)
class _Trouble:
    """An upload whose server did not hear of its end. next_at: monotonic s."""

    delays: Iterator[float]
    next_at: float


class TidyUploads:
    """`run` beside the service. is_open: whether the job of an output folder has not ended yet."""

    def __init__(self, uploads: LongUploads, is_open: Callable[[str], bool], clock: Clock, ids: Ids) -> None:
        self._uploads = uploads
        self._is_open = is_open
        self._clock = clock
        self._ids = ids
        self._troubles: dict[str, _Trouble] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look_once()
            except (OSError, sqlite3.Error) as problem:  # the loop's boundary: the next look may do better
                log.warning("uploads.not_tidied", why=str(problem))
            await self._clock.sleep(LOOK_EVERY_S)

    async def look_once(self) -> None:
        for upload in await anyio.to_thread.run_sync(self._uploads.book.all):
            trouble = self._troubles.get(upload.upload_id)
            if self._is_open(upload.key.partition("/")[0]):
                continue
            if trouble is None or trouble.next_at <= self._clock.monotonic():
                await self._abort(upload)

    async def _abort(self, upload: OpenUpload) -> None:
        try:
            await self._uploads.abort(upload)
        except StorageFailed as problem:
            trouble = self._troubles.setdefault(upload.upload_id, _Trouble(delays=DAYS.delays(self._ids), next_at=0.0))
            wait_s = next(trouble.delays, None)
            if wait_s is not None:
                trouble.next_at = self._clock.monotonic() + wait_s
                return
            log.warning("upload.left_behind", key=upload.key, bucket=upload.settings.bucket, why=str(problem))
            await self._uploads.forget(upload)
        else:
            log.info("upload.aborted", key=upload.key)
        self._troubles.pop(upload.upload_id, None)

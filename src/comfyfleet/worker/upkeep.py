"""What a worker does to its jobs by the clock: ends those whose time is over, saves what it learned, forgets old
results and takes their files away.

A file goes when nobody can reach it any more: its result is forgotten, and the last link that a reader may have been
given has expired. Files of results in a store have no link here and go with their result.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.storage.local import LocalStorage
from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.generation import GenerateResult
from comfyfleet.worker.engines.learned import Durations
from comfyfleet.worker.job import Job
from comfyfleet.worker.job_book import JobBook
from comfyfleet.worker.journal import ForgottenJob, Journal
from comfyfleet.worker.limits import reason_to_stop

log = structlog.get_logger()

_SWEEP_S = 0.25
_SAVE_LEARNED_S = 30.0
_FORGET_EVERY_S = 600.0
_result_decoder = msgspec.json.Decoder(GenerateResult)


class Sweep:
    """Deadlines, queue waits and callers that did not come back."""

    def __init__(
        self,
        book: JobBook,
        clock: Clock,
        *,
        grace_s: float,
        eta_s: Callable[[Job], float | None],
        stop: Callable[[Job, FleetError], None],
    ) -> None:
        self._book = book
        self._clock = clock
        self._grace_s = grace_s
        self._eta_s = eta_s
        self._stop = stop

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._clock.sleep(_SWEEP_S)
            now, ticks = self._clock.now(), self._clock.monotonic()
            for job in self._book.live():
                reason = reason_to_stop(job, now, ticks, grace_s=self._grace_s, eta_s=self._eta_s)
                if reason is not None:
                    self._stop(job, reason)


class Retention:
    """Forgets results after `result_ttl_s`, and removes their output folders once no link leads there."""

    def __init__(
        self,
        journal: Journal,
        local: LocalStorage,
        *,
        result_ttl_s: float,
        live_folders: Callable[[], set[str]],
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._journal = journal
        self._local = local
        self._result_ttl_s = result_ttl_s
        self._live_folders = live_folders
        self._clock = clock
        self._ids = ids

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._clock.sleep(_FORGET_EVERY_S)
            try:
                await self.forget_once()
            except (OSError, sqlite3.Error) as problem:  # the loop's boundary: the next round may do better
                log.warning("results.not_forgotten", why=str(problem))

    async def forget_once(self) -> int:
        """One round; how many folders went."""
        now = self._clock.now()
        await self._journal.forget_before(now - self._result_ttl_s, lambda job: now + self._links_last_s(job))
        gone = 0
        while folders := self._journal.outlived_folders(now):
            for folder in folders:
                gone += await self._remove(folder)
            await self._journal.folders_are_gone(folders)
        if gone:
            log.info("results.removed", folders=gone)
        return gone

    def _links_last_s(self, job: ForgottenJob) -> float:
        """For how long a link given out a moment ago would lead to this job's files; 0 when they are elsewhere."""
        try:
            outputs = _result_decoder.decode(job.result).output
        except msgspec.MsgspecError:
            return 0.0
        here = [output.url_expires_at or 0.0 for output in outputs if self._local.serves(output.url)]
        # A result read again gets links as long as the first ones, from then on.
        return max(0.0, *(at - job.finished_at for at in here)) if here else 0.0

    async def _remove(self, folder: str) -> bool:
        """Out of sight at once, then off the disk: no new job of the same id can lose a file to this."""
        if folder in self._live_folders() or self._journal.knows_folder(folder):
            return False
        place, aside = self._local.path(folder), self._local.drafts / f"expired-{self._ids.request_id()}"
        try:
            _move(place, aside)
        except FileNotFoundError:
            return False
        await anyio.to_thread.run_sync(shutil.rmtree, aside, True)
        return True


async def save_learned(journal: Journal, durations: Durations, clock: Clock) -> None:
    """Keep what was learned of durations, now and then, until cancelled."""
    while True:
        await clock.sleep(_SAVE_LEARNED_S)
        await journal.save_learned(durations.dump())


def _move(place: Path, aside: Path) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    os.rename(place, aside)

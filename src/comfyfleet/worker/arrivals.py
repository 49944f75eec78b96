"""Jobs on their way into the journal: entered already, and not yet accepted. Who repeats one meanwhile waits for that.

A job is accepted once it is on the disk and not before, so nobody may be told of one that may yet be refused.
"""

from __future__ import annotations

import sqlite3

import anyio

from comfyfleet.wire.errors import DiskFull
from comfyfleet.worker.job import Job
from comfyfleet.worker.job_book import JobBook
from comfyfleet.worker.journal import Journal


class Arrivals:
    """`len` is how many are being written now: they count against the queue's limit."""

    def __init__(self, book: JobBook, journal: Journal) -> None:
        self._book = book
        self._journal = journal
        self._decided: dict[Job, anyio.Event | None] = {}  # an event where somebody waits

    def __len__(self) -> int:
        return len(self._decided)

    async def known(self, scope: str, key: str) -> Job | None:
        """A job by its key; one that is being written only once that is done, since it may fail."""
        while (job := self._book.find(scope, key)) is not None and job in self._decided:
            decided = self._decided[job] = self._decided[job] or anyio.Event()
            await decided.wait()
        return job

    async def accept(self, job: Job) -> None:
        """Write down a job that is entered in the book. Raises DiskFull; then it was never there."""
        self._decided[job] = None
        try:
            await self._journal.accept(job)
        except (sqlite3.Error, OSError) as problem:
            self._forget(job)
            raise DiskFull("the worker cannot write its journal") from problem
        except BaseException:
            self._forget(job)
            raise
        finally:
            decided = self._decided.pop(job)
            if decided is not None:
                decided.set()

    def _forget(self, job: Job) -> None:
        """Whoever found it by its id meanwhile waits no more."""
        self._book.drop(job)
        job.events.close()
        job.done.set()

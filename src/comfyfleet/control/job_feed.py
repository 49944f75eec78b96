"""Who waits for news of a durable job: followers of its events, and the runs that must hear of a cancel.

Carries no news itself, only "look again": the store is the truth, so a follower that missed a call misses nothing.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import anyio


class JobFeed:
    """One event per job that somebody waits for; and which running jobs are to be cancelled."""

    def __init__(self) -> None:
        # As long as somebody holds the event: a follower that leaves has nothing to tidy up.
        self._news: WeakValueDictionary[str, anyio.Event] = WeakValueDictionary()
        self._cancels: dict[str, anyio.Event] = {}
        self.is_closed = False

    def close(self) -> None:
        """This process ends: every follower looks once more and leaves (and comes back to the next one)."""
        self.is_closed = True
        self.all_news()

    def all_news(self) -> None:
        """Something about any job may have changed."""
        for job_id in list(self._news.keys()):
            self.news(job_id)

    def news(self, job_id: str) -> None:
        """Something about the job changed."""
        event = self._news.pop(job_id, None)
        if event is not None:
            event.set()

    def watch(self, job_id: str) -> anyio.Event:
        """An event that fires at the next news; take it before looking, so that nothing falls in between."""
        return self._news.setdefault(job_id, anyio.Event())

    def cancel(self, job_id: str) -> None:
        """Tell the run of a job that its caller wants it no more."""
        event = self._cancels.get(job_id)
        if event is not None:
            event.set()

    def cancel_event(self, job_id: str) -> anyio.Event:
        """For the run of a job; taken before the lease, so that no cancel falls in between. `done` ends it."""
        event = self._cancels[job_id] = anyio.Event()
        return event

    def done(self, job_id: str, cancelled: anyio.Event) -> None:
        """The run that took this event has ended; the next run of the job may have begun."""
        if self._cancels.get(job_id) is cancelled:
            del self._cancels[job_id]
        self.news(job_id)


class Kick:
    """Wakes a loop: any number of kicks while it works are one."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def __call__(self) -> None:
        self._event.set()

    async def wait(self, at_most_s: float) -> None:
        with anyio.move_on_after(at_most_s):
            await self._event.wait()
        self._event = anyio.Event()

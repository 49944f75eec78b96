"""A durable job's events as one stream of server-sent frames: what happened, then what happens, up to its end.

Looked up in the store; the feed only says when to look. Every look is in this order: ask to be told of news, ask
whether the job is over, read its events. So whatever happens during a look is either in what was read or news.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec

from comfyfleet.control.fresh_links import FreshLinks
from comfyfleet.control.job_feed import JobFeed
from comfyfleet.control.jobs import Job, JobEvent
from comfyfleet.control.ownership import Ownership
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.web import sse_frame
from comfyfleet.wire.jobs import JOB_FINAL

_PING_S = 15.0
_LOOK_EVERY_S = 3.0
_FINAL_KINDS = frozenset(str(status) for status in JOB_FINAL)


class JobEvents:
    """Streams, one for each follower."""

    def __init__(self, *, store: Store, feed: JobFeed, ownership: Ownership, links: FreshLinks) -> None:
        self._store = store
        self._feed = feed
        self._ownership = ownership
        self._links = links

    async def frames(self, job: Job, after: int) -> AsyncIterator[bytes]:
        """Events numbered above `after`, the last of them the job's end."""
        quiet_s = 0.0
        while True:
            news, is_closed = self._feed.watch(job.id), self._feed.is_closed
            try:
                current, events = await self._look(job.id, after)
            except ConnectionLost:  # there is nothing to tell until the database is back
                current, events = job, []
            for event in events:
                after = event.seq
                yield self._frame(event, current)
                if event.kind in _FINAL_KINDS:
                    return
            if current is None or current.is_final or is_closed:
                return
            if events:
                continue
            # News of a job that another control plane runs comes through the database, and may be lost: look again.
            wait_s = _PING_S if self._ownership.owns(job.endpoint_id) else _LOOK_EVERY_S
            with anyio.move_on_after(wait_s):
                await news.wait()
                continue
            quiet_s += wait_s
            if quiet_s >= _PING_S:
                quiet_s = 0.0
                yield b": still here\n\n"

    async def _look(self, job_id: str, after: int) -> tuple[Job | None, list[JobEvent]]:
        """The job, and everything that had happened to it by then; as it is at its end if that is among it."""
        current = await self._store.job(job_id)
        events = await self._store.events(job_id, after)
        if any(event.kind in _FINAL_KINDS for event in events):
            current = await self._store.job(job_id)
        return current, events

    def _frame(self, event: JobEvent, job: Job | None) -> bytes:
        body: dict[str, Any] = {"id": event.job_id, "event": event.kind, "at": event.at}
        data = msgspec.json.decode(event.data)
        if event.kind in _FINAL_KINDS:
            if job is not None and job.result is not None:
                body["result"] = self._links.result(job)
            if data:
                body["error"] = data
        else:
            body |= {"data": data}
        return sse_frame(msgspec.json.encode(body), event=event.kind, event_id=str(event.seq))

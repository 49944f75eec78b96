"""The loop that tidies: jobs past their deadline, jobs and records of deleted endpoints, what is too old to keep."""

from __future__ import annotations

import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.backlog import Backlog
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.job_feed import JobFeed, Kick
from comfyfleet.control.ownership import Ownership
from comfyfleet.control.records import DemandRow, Endpoint, Workergroup
from comfyfleet.control.store.base import Store
from comfyfleet.control.workers import Workers

log = structlog.get_logger()

EVERY_S = 1.0
PRUNE_EVERY_S = 600.0
_OVERDUE = msgspec.json.encode(
    {"code": "deadline_exceeded", "message": "the deadline passed before a worker had it", "details": {}}
).decode()
_ENDPOINT_GONE = msgspec.json.encode(
    {"code": "endpoint_deleted", "message": "its endpoint was deleted", "details": {}}
).decode()


class Janitor:
    """`ended` is kicked for jobs that end here, so that their webhooks go out."""

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        workers: Workers,
        feed: JobFeed,
        backlog: Backlog,
        clock: Clock,
        ended: Kick,
        keep_s: float,
        ownership: Ownership,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._workers = workers
        self._feed = feed
        self._backlog = backlog
        self._clock = clock
        self._ended = ended
        self._keep_s = keep_s
        self._ownership = ownership

    async def run(self) -> None:
        next_prune = 0.0
        while True:
            try:
                await self.step()
                if self._clock.now() >= next_prune:
                    next_prune = self._clock.now() + PRUNE_EVERY_S
                    await self._store.prune(self._clock.now() - self._keep_s)
                    await self._store.forget_logs(self._clock.now() - self._keep_s)
            except Exception:  # one iteration
                log.exception("janitor.failed")
            await self._clock.sleep(EVERY_S)

    async def step(self) -> None:
        """One pass."""
        for job_id in await self._store.overdue(self._clock.now()):
            await self._fail(job_id, _OVERDUE)
        for endpoint in self._catalog.endpoints():
            if endpoint.deleted_at is not None and self._ownership.owns(endpoint.id):
                await self._clear(endpoint)
        for group in self._catalog.workergroups():
            if group.deleted_at is None or not self._ownership.owns(group.endpoint_id):
                continue  # only its owner knows its workers
            is_empty = all(worker.group_id != group.id for worker in self._workers.of_endpoint(group.endpoint_id))
            if is_empty:
                await self._store.drop(Workergroup, group.id)
                self._catalog.drop_workergroup(group.id)

    async def _clear(self, endpoint: Endpoint) -> None:
        """A deleted endpoint: fail what waits; forget it when its last worker and job are gone."""
        waiting = [row for row in await self._store.waiting() if row.endpoint_id == endpoint.id]
        for row in waiting:
            while (head := await self._store.head(endpoint.id, row.scope, float("inf"))) is not None:
                await self._fail(head.id, _ENDPOINT_GONE)
        is_running = any(job.endpoint_id == endpoint.id for job in await self._store.leased())
        # Its webhooks are its owner's to tell, and an endpoint that is forgotten has none.
        is_untold = await self._store.has_untold(endpoint.id)
        if not self._workers.of_endpoint(endpoint.id) and not is_running and not is_untold:
            await self._store.drop(DemandRow, endpoint.id)
            await self._store.drop(Endpoint, endpoint.id)
            self._catalog.drop_endpoint(endpoint.id)

    async def _fail(self, job_id: str, error: str) -> None:
        if not await self._store.fail_waiting(job_id, error=error, now=self._clock.now()):
            return  # a worker has it by now, or it is over
        if (job := await self._store.job(job_id)) is not None:
            self._backlog.remove(job.endpoint_id, job.scope, job.cost)  # its key may have another one wait at once
        self._feed.news(job_id)
        self._ended()

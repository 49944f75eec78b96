"""The leases that this process holds, each from the moment it is ours to the end of the run that follows it.

A lease gets here in two ways: `lease`, of a job that waited, and `take_over`, of one whose holder is gone while its
worker goes on. What this is not: it chooses no job and no worker (`dispatcher`), knows no rule of a lease (`leases`)
and does not follow the job itself (`job_run`). A token is in `_held` exactly as long as its run lives; with the run
end its booking at the desk, its share of what runs and its ear for a cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anyio
import anyio.abc
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.backlog import Backlog
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.desk import Desk
from comfyfleet.control.job_feed import JobFeed, Kick
from comfyfleet.control.job_run import JobRun, RunOutcome
from comfyfleet.control.jobs import Job, JobHead, Lease
from comfyfleet.control.keys import Vault
from comfyfleet.control.leases import LEASE_S, LOST_AFTER_S, is_abandoned, is_left_behind
from comfyfleet.control.ownership import NotOwner, Ownership
from comfyfleet.control.placements import Placed
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.store.ownership_table import Fenced
from comfyfleet.control.tickets import TICKET_LIFETIME_S, Tickets
from comfyfleet.control.worker_calls import WorkerCalls
from comfyfleet.control.workers import Workers
from comfyfleet.ids import Ids
from comfyfleet.wire.routing import RouteReady
from comfyfleet.wire.tickets import TicketClaims

log = structlog.get_logger()

_DATABASE_AGAIN_S = 1.0
_WITHDRAW_FOR_S = 180.0


class HeldLeases:
    """One for the control plane. `ended` hears of every run's end; then `kick` wakes the dispatcher: there may be room.

    Runs are tasks of the group that `lease` and `take_over` are given; their leases outlive it.
    """

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        desk: Desk,
        workers: Workers,
        tickets: Tickets,
        calls: WorkerCalls,
        feed: JobFeed,
        backlog: Backlog,
        vault: Vault,
        clock: Clock,
        ids: Ids,
        ended: Callable[[RunOutcome], None],
        kick: Kick,
        ownership: Ownership,
        lost_after_s: float = LOST_AFTER_S,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._desk = desk
        self._workers = workers
        self._tickets = tickets
        self._calls = calls
        self._feed = feed
        self._backlog = backlog
        self._vault = vault
        self._clock = clock
        self._ids = ids
        self._ended = ended
        self._kick = kick
        self._ownership = ownership
        self._lost_after_s = lost_after_s
        self._held: dict[str, tuple[int, anyio.CancelScope]] = {}  # lease token -> (endpoint, its run)

    async def lease(self, head: JobHead, placed: Placed, runs: anyio.abc.TaskGroup) -> None:
        """Lease a waiting job to the worker that was found for it, and run it there. Raises Fenced, NotOwner."""
        cancelled = self._feed.cancel_event(head.id)
        try:
            job = await self._leased(head, placed)
        except (Fenced, NotOwner):
            self._desk.release(placed.answer.request_idx)
            self._feed.done(head.id, cancelled)
            raise
        if job is None:  # cancelled in between
            self._backlog.remove(head.endpoint_id, head.scope, head.cost)
            self._desk.release(placed.answer.request_idx)
            self._feed.done(head.id, cancelled)
            return
        self._backlog.began(head.endpoint_id, head.scope, head.cost)
        self._feed.news(job.id)
        self._hold(job, placed.answer, cancelled, runs)

    async def take_over(self, jobs: Iterable[Job], runs: anyio.abc.TaskGroup) -> None:
        """Become the holder of leases whose control plane is gone; the workers go on meanwhile."""
        for listed in jobs:
            if listed.lease_token in self._tokens() or not self._ownership.owns(listed.endpoint_id):
                continue
            # A cancel since the list was read is in what is read now; a later one is heard.
            cancelled = self._feed.cancel_event(listed.id)
            job = await self._store.job(listed.id)
            if job is None or job.lease_token != listed.lease_token:
                self._feed.done(listed.id, cancelled)
                continue
            token, expires_at = self._ids.token(), self._clock.now() + LEASE_S
            old_token, fence = job.lease_token or "", self._ownership.fence(job.endpoint_id)
            if not await self._store.take_over(
                job.id, old_token=old_token, token=token, expires_at=expires_at, fence=fence
            ):
                self._feed.done(job.id, cancelled)
                continue
            mine = msgspec.structs.replace(job, lease_token=token, lease_expires=expires_at)
            log.info("lease.taken_over", job=job.id, worker=job.worker_id)
            self._hold(mine, None, cancelled, runs)

    def let_go(self, endpoint_id: int) -> None:
        """The endpoint is another's: its leases are followed from there."""
        for of, scope in list(self._held.values()):
            if of == endpoint_id:
                scope.cancel()

    def is_abandoned(self, job: Job) -> bool:
        """Its lease is over and none of ours: whoever held it is gone."""
        return is_abandoned(job, self._tokens(), self._clock.now())

    async def _leased(self, head: JobHead, placed: Placed) -> Job | None:
        """The lease, however long the database is away meanwhile; None: somebody else has the job, or it is over."""
        token = self._ids.token()
        while True:
            now = self._clock.now()
            lease = Lease(
                job_id=head.id,
                token=token,
                leased_at=now,
                expires_at=now + LEASE_S,
                worker_id=placed.worker_id,
                worker_url=placed.answer.url,
                request_idx=placed.answer.request_idx,
            )
            try:
                job = await self._store.lease(lease, fence=self._ownership.fence(head.endpoint_id))
                if job is not None:
                    return job
                # Ours all the same, where the commit was done and its confirmation lost with the connection.
                found = await self._store.job(head.id)
                return found if found is not None and found.lease_token == token else None
            except ConnectionLost as error:
                log.warning("dispatch.waits_for_database", error=str(error).strip())
                await self._clock.sleep(_DATABASE_AGAIN_S)

    def _tokens(self) -> set[str]:
        """Of the leases that we hold and follow; a run that was told to let go is only tidying up."""
        return {token for token, (_, scope) in self._held.items() if not scope.cancel_called}

    def _hold(self, job: Job, ticket: RouteReady | None, cancelled: anyio.Event, runs: anyio.abc.TaskGroup) -> None:
        """Run a job whose lease is ours from now on."""
        scope = anyio.CancelScope()
        self._held[job.lease_token or ""] = (job.endpoint_id, scope)
        runs.start_soon(self._run, job, ticket, cancelled, scope, name=f"job {job.id}")

    async def _run(self, job: Job, ticket: RouteReady | None, cancelled: anyio.Event, scope: anyio.CancelScope) -> None:
        run = JobRun(
            job,
            store=self._store,
            workers=self._workers,
            calls=self._calls,
            feed=self._feed,
            vault=self._vault,
            clock=self._clock,
            ticket_for=self._ticket_for,
            cancelled=cancelled,
            lost_after_s=self._lost_after_s,
            owns=lambda: self._ownership.owns(job.endpoint_id),
        )
        outcome = RunOutcome(job=job, status=None, reason="another control plane follows it from here")
        try:
            with scope:
                outcome = await run.run(ticket)
            if scope.cancelled_caught:
                return
        except Exception:  # the stage boundary of a run: the lease expires, and the job is taken over
            log.exception("job.run_failed", job=job.id)
            return
        finally:
            del self._held[job.lease_token or ""]
            self._feed.done(job.id, cancelled)
            self._backlog.ended(job.endpoint_id, job.scope, job.cost)
            if job.request_idx is not None:
                self._desk.release(job.request_idx)
        if outcome.status is None:
            log.warning("job.gave_back", job=job.id, worker=job.worker_id, why=outcome.reason)
            self._backlog.add(job.endpoint_id, job.scope, job.cost, job.created_at)
        self._ended(outcome)
        self._kick()
        if outcome.is_left_behind:
            await self._withdraw(job)

    async def _withdraw(self, job: Job) -> None:
        """A lost worker that comes back finds the job in its journal, and would render what another renders now.

        Or what it is to render itself: where the job is its own again, there is nothing to drop.
        """
        until, worker_id = self._clock.now() + _WITHDRAW_FOR_S, job.worker_id or 0
        while self._clock.now() < until:
            await self._clock.sleep(0.5)
            try:
                now_is = await self._store.job(job.id)
            except Exception as error:  # one iteration: whatever ails the database, the other runs go on
                log.warning("lease.not_withdrawn", job=job.id, worker=worker_id, error=str(error))
                continue
            if now_is is None or now_is.worker_id == worker_id:
                return
            ticket = self._ticket_for(job) if is_left_behind(now_is, worker_id) else None
            if ticket is not None and await self._calls.withdraw(ticket, job.id):
                return

    def _ticket_for(self, job: Job) -> RouteReady | None:
        """To ask the worker a leased job is on. reqnum 0: it starts nothing."""
        worker = self._workers.get(job.worker_id or 0)
        endpoint = self._catalog.endpoint(job.endpoint_id)
        url = (worker.url if worker is not None else "") or (job.worker_url if worker is not None else "")
        if worker is None or endpoint is None or not url:
            return None
        claims = TicketClaims(
            url=url,
            endpoint=endpoint.endpoint_name,
            cost=job.cost,
            reqnum=0,
            request_idx=job.request_idx or 0,
            exp=self._clock.now() + TICKET_LIFETIME_S,
            sub=job.scope,
            incarnation=worker.incarnation,
        )
        return self._tickets.admit(claims, job.id)

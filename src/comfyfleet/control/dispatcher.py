"""The loop that gives waiting durable jobs to workers: whose turn, which worker, a lease, a run.

A job is bound to a worker as late as possible: one job per endpoint stands in the desk's line, beside the callers of
`/route/`, and only when a worker has room is the next job of the key whose turn it is leased to it. After a restart
every lease found in the store is taken over and followed on: the worker has the job, only we were away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
from comfyfleet.control.leases import LEASE_S, LOST_AFTER_S, is_abandoned
from comfyfleet.control.ownership import NotOwner, Ownership
from comfyfleet.control.placements import Placed, TakeRequest
from comfyfleet.control.records import Endpoint
from comfyfleet.control.route_queue import Phase, RouteTicket
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

TICK_S = 1.0
RESYNC_EVERY_S = 10.0
# Where another control plane may have stored a job of our endpoint, and its word of it may have been lost.
RESYNC_SHARED_S = 2.0
# However many jobs others store: what waits is summed up no more often.
_RESYNC_PAUSE_S = 0.25
_REPLAY_TIMEOUT_S = 60.0
_WITHDRAW_FOR_S = 180.0
_LOOK_AGAIN_S = 0.25


@dataclass(frozen=True, kw_only=True)
class _InLine:
    """The place that one endpoint's durable jobs hold at the desk."""

    ticket: RouteTicket
    scope: str
    tried_at: float


class Dispatcher:
    """One for the control plane. `ended` hears of every run's end."""

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
        ownership: Ownership,
        lost_after_s: float = LOST_AFTER_S,
    ) -> None:
        self.kick = Kick()
        self._ownership = ownership
        self._resync_every_s = RESYNC_SHARED_S if ownership.is_shared else RESYNC_EVERY_S
        self._begun: set[int] = set()  # endpoints that are newly ours: what is leased there has lost its holder
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
        self._lost_after_s = lost_after_s
        self._in_line: dict[int, _InLine] = {}
        self._held: dict[str, tuple[int, anyio.CancelScope]] = {}  # lease token -> (endpoint, its run)
        self._is_stale = False
        self._synced_at = 0.0

    async def run(self) -> None:
        """Until cancelled. Runs are tasks of this loop; their leases outlive us."""
        async with anyio.create_task_group() as runs:
            if not self._ownership.is_shared:
                await self._take_over(runs, await self._store.leased())
            next_sync = 0.0
            while True:
                try:
                    if self._begun:
                        begun, next_sync = frozenset(self._begun), 0.0
                        leased = await self._store.leased()
                        await self._take_over(runs, [job for job in leased if job.endpoint_id in begun])
                        self._begun -= begun
                    if self._clock.now() >= next_sync or self._is_due_again():
                        self._is_stale, self._synced_at = False, self._clock.now()
                        next_sync = self._synced_at + self._resync_every_s
                        self._backlog.begin_sync()
                        self._backlog.replace(await self._store.waiting())
                        leased = await self._store.leased()
                        self._backlog.replace_running(leased)
                        await self._take_over(runs, [job for job in leased if self._is_abandoned(job)])
                    # Side by side: what the endpoints lease at one moment, the store commits together.
                    async with anyio.create_task_group() as serving:
                        for endpoint in self._catalog.endpoints():
                            if not self._ownership.owns(endpoint.id):
                                continue
                            if self._backlog.scopes(endpoint.id):
                                serving.start_soon(self._serve_one, endpoint, runs)
                            else:
                                self._leave_line(endpoint.id)
                                self._tell_demand(endpoint.id)
                except (Fenced, NotOwner) as error:  # another's by now; the store wrote nothing
                    log.info("dispatch.fenced", why=str(error))
                except Exception:  # one iteration: what waits is still waiting in the store
                    log.exception("dispatch.failed")
                await self.kick.wait(TICK_S)

    def submitted(self, jobs: Iterable[Job]) -> None:
        """Jobs were stored: demand for the autoscaler, and a reason to look now."""
        for job in jobs:
            self._backlog.add(job.endpoint_id, job.scope, job.cost, job.created_at)
            self._desk.arrived(job.endpoint_id, job.cost)
        self.kick()

    def begin(self, endpoint_id: int) -> None:
        """The endpoint is ours from now on, its leased jobs included."""
        self._begun.add(endpoint_id)
        self.kick()

    def drop(self, endpoint_id: int) -> None:
        """The endpoint is another's: leave its jobs where they are; their leases are followed from there."""
        self._begun.discard(endpoint_id)
        self._leave_line(endpoint_id)
        for of, scope in list(self._held.values()):
            if of == endpoint_id:
                scope.cancel()

    def look_again(self) -> None:
        """Another process stored jobs: what we know of what waits is old."""
        self._is_stale = True
        self.kick()

    def _is_due_again(self) -> bool:
        return self._is_stale and self._clock.now() >= self._synced_at + _RESYNC_PAUSE_S

    # --- waiting jobs ------------------------------------------------------------------------------------------------

    async def _serve_one(self, endpoint: Endpoint, runs: anyio.abc.TaskGroup) -> None:
        """An endpoint's turn; what goes wrong there is its own."""
        try:
            await self._serve(endpoint, runs)
            self._tell_demand(endpoint.id)
        except (Fenced, NotOwner) as error:  # another's by now; the store wrote nothing
            log.info("dispatch.fenced", why=str(error))
        except Exception:  # one endpoint's turn: what waits there is still waiting in the store
            log.exception("dispatch.failed", endpoint=endpoint.id)

    async def _serve(self, endpoint: Endpoint, runs: anyio.abc.TaskGroup) -> None:
        """Lease jobs as long as there is a job and a worker with room."""
        standing = self._in_line.get(endpoint.id)
        if (
            standing is not None
            and standing.ticket.phase is Phase.WAITING
            and self._clock.monotonic() - standing.tried_at < _LOOK_AGAIN_S
        ):
            return  # a new job behind a full line changes nothing; the desk says when there is room
        share = self._desk.turns.share(endpoint.id)
        barren: set[str] = set()
        while True:
            scopes = [scope for scope in self._backlog.scopes(endpoint.id) if scope not in barren]
            scope = share.next(scopes)
            if scope is None:
                self._leave_line(endpoint.id)
                return
            head = await self._store.head(endpoint.id, scope, self._clock.now())
            if head is None:  # all of them are held back for a moment
                barren.add(scope)
                continue
            placed = self._place(endpoint, head, runs)
            if placed is None:
                return
            await self._start(head, placed, runs)

    def _place(self, endpoint: Endpoint, head: JobHead, runs: anyio.abc.TaskGroup) -> Placed | None:
        """A worker for the job, or its place in the line kept."""
        standing = self._in_line.get(endpoint.id)
        if standing is not None and standing.scope != head.scope:
            self._leave_line(endpoint.id)
            standing = None
        found = self._desk.take(
            TakeRequest(
                endpoint_id=endpoint.id,
                endpoint_name=endpoint.endpoint_name,
                max_queue_time=endpoint.max_queue_time,
                scope=head.scope,
                cost=head.cost,
                request_idx=standing.ticket.request_idx if standing is not None else 0,
                replay_timeout=_REPLAY_TIMEOUT_S,
                models=frozenset(msgspec.json.decode(head.models, type=list[str])),
                shape=head.shape,
                held=True,
                excluded=head.lost_on,
            )
        )
        if isinstance(found, Placed):
            self._in_line.pop(endpoint.id, None)
            return found
        self._in_line[endpoint.id] = _InLine(ticket=found.ticket, scope=head.scope, tried_at=self._clock.monotonic())
        if found.ticket.changed is None:
            found.ticket.changed = anyio.Event()
            runs.start_soon(self._wake, found.ticket.changed, name="dispatch wake")
        return None

    async def _wake(self, changed: anyio.Event) -> None:
        with anyio.move_on_after(_REPLAY_TIMEOUT_S):
            await changed.wait()
        self.kick()

    def _leave_line(self, endpoint_id: int) -> None:
        standing = self._in_line.pop(endpoint_id, None)
        if standing is not None:
            self._desk.release(standing.ticket.request_idx)

    async def _start(self, head: JobHead, placed: Placed, runs: anyio.abc.TaskGroup) -> None:
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
                await self._clock.sleep(TICK_S)

    # --- leased jobs -------------------------------------------------------------------------------------------------

    async def _take_over(self, runs: anyio.abc.TaskGroup, jobs: Iterable[Job]) -> None:
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

    def _is_abandoned(self, job: Job) -> bool:
        return is_abandoned(job, self._tokens(), self._clock.now())

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
        self.kick()
        if outcome.is_left_behind:
            await self._withdraw(job)

    async def _withdraw(self, job: Job) -> None:
        """A lost worker that comes back finds the job in its journal, and would render what another renders now."""
        until = self._clock.now() + _WITHDRAW_FOR_S
        while self._clock.now() < until:
            ticket = self._ticket_for(job)
            if ticket is not None and await self._calls.cancel(ticket, job.id):
                return
            await self._clock.sleep(0.5)

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

    def _tell_demand(self, endpoint_id: int) -> None:
        """What waits here beyond the one that stands in the line."""
        standing = 1 if endpoint_id in self._in_line else 0
        total = self._backlog.total(endpoint_id)
        jobs = max(0, total.jobs - standing)
        cost = total.cost * jobs / total.jobs if total.jobs else 0.0
        self._desk.set_backlog(endpoint_id, jobs=jobs, cost=cost, oldest_at=total.oldest_at)

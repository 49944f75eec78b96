"""The loop over waiting durable jobs: whose turn it is, which worker has room, and on to a lease.

A job is bound to a worker as late as possible: one job per endpoint stands in the desk's line, beside the callers of
`/route/`, and only when a worker has room is the next job of the key whose turn it is leased to it. After a restart
every lease found in the store is taken over and followed on: the worker has the job, only we were away. What becomes
of a lease is no business of this loop: `held_leases` has it from then on, and wakes us when there may be room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import anyio
import anyio.abc
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.backlog import Backlog
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.desk import Desk
from comfyfleet.control.held_leases import HeldLeases
from comfyfleet.control.job_feed import Kick
from comfyfleet.control.jobs import Job, JobHead
from comfyfleet.control.ownership import NotOwner, Ownership
from comfyfleet.control.placements import Placed, TakeRequest
from comfyfleet.control.records import Endpoint
from comfyfleet.control.route_queue import Phase, RouteTicket
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.ownership_table import Fenced

log = structlog.get_logger()

TICK_S = 1.0
RESYNC_EVERY_S = 10.0
# Where another control plane may have stored a job of our endpoint, and its word of it may have been lost.
RESYNC_SHARED_S = 2.0
# However many jobs others store: what waits is summed up no more often.
_RESYNC_PAUSE_S = 0.25
_REPLAY_TIMEOUT_S = 60.0
_LOOK_AGAIN_S = 0.25


@dataclass(frozen=True, kw_only=True)
class _InLine:
    """The place that one endpoint's durable jobs hold at the desk."""

    ticket: RouteTicket
    scope: str
    tried_at: float


class Dispatcher:
    """One for the control plane. `kick` wakes the loop at once; `leases` has the same one, for a run that ended."""

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        desk: Desk,
        backlog: Backlog,
        leases: HeldLeases,
        clock: Clock,
        kick: Kick,
        ownership: Ownership,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._desk = desk
        self._backlog = backlog
        self._leases = leases
        self._clock = clock
        self._kick = kick
        self._ownership = ownership
        self._resync_every_s = RESYNC_SHARED_S if ownership.is_shared else RESYNC_EVERY_S
        self._begun: set[int] = set()  # endpoints that are newly ours: what is leased there has lost its holder
        self._in_line: dict[int, _InLine] = {}
        self._is_stale = False
        self._synced_at = 0.0

    async def run(self) -> None:
        """Until cancelled. Runs are tasks of this loop; their leases outlive us."""
        async with anyio.create_task_group() as runs:
            if not self._ownership.is_shared:
                await self._leases.take_over(await self._store.leased(), runs)
            next_sync = 0.0
            while True:
                try:
                    if self._begun:
                        begun, next_sync = frozenset(self._begun), 0.0
                        leased = await self._store.leased()
                        await self._leases.take_over([job for job in leased if job.endpoint_id in begun], runs)
                        self._begun -= begun
                    if self._clock.now() >= next_sync or self._is_due_again():
                        self._is_stale, self._synced_at = False, self._clock.now()
                        next_sync = self._synced_at + self._resync_every_s
                        self._backlog.begin_sync()
                        self._backlog.replace(await self._store.waiting())
                        leased = await self._store.leased()
                        self._backlog.replace_running(leased)
                        abandoned = [job for job in leased if self._leases.is_abandoned(job)]
                        await self._leases.take_over(abandoned, runs)
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
                await self._kick.wait(TICK_S)

    def submitted(self, jobs: Iterable[Job]) -> None:
        """Jobs were stored: demand for the autoscaler, and a reason to look now."""
        for job in jobs:
            self._backlog.add(job.endpoint_id, job.scope, job.cost, job.created_at)
            self._desk.arrived(job.endpoint_id, job.cost)
        self._kick()

    def begin(self, endpoint_id: int) -> None:
        """The endpoint is ours from now on, its leased jobs included."""
        self._begun.add(endpoint_id)
        self._kick()

    def drop(self, endpoint_id: int) -> None:
        """The endpoint is another's: leave its jobs where they are; their leases are followed from there."""
        self._begun.discard(endpoint_id)
        self._leave_line(endpoint_id)
        self._leases.let_go(endpoint_id)

    def look_again(self) -> None:
        """Another process stored jobs: what we know of what waits is old."""
        self._is_stale = True
        self._kick()

    def _is_due_again(self) -> bool:
        return self._is_stale and self._clock.now() >= self._synced_at + _RESYNC_PAUSE_S

    # --- an endpoint's turn ------------------------------------------------------------------------------------------

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
        kept_away: set[str] = set()  # of the barren ones: their job waits for a worker that did not lose it
        while True:
            scopes = [scope for scope in self._backlog.scopes(endpoint.id) if scope not in barren]
            scope = share.next(scopes)
            if scope is None:
                standing = self._in_line.get(endpoint.id)
                if standing is not None and standing.scope not in kept_away:
                    self._leave_line(endpoint.id)
                return
            head = await self._store.head(endpoint.id, scope, self._clock.now())
            if head is None:  # all of them are held back for a moment
                barren.add(scope)
                continue
            excluded = self._desk.to_avoid(endpoint.id, head.lost_on)
            placed = self._place(endpoint, head, excluded, runs)
            if placed is None:
                if not excluded:
                    return
                # The others may have the workers that this one must not.
                barren.add(scope)
                kept_away.add(scope)
                continue
            await self._leases.lease(head, placed, runs)

    def _place(
        self, endpoint: Endpoint, head: JobHead, excluded: frozenset[int], runs: anyio.abc.TaskGroup
    ) -> Placed | None:
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
                excluded=excluded,
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
        self._kick()

    def _leave_line(self, endpoint_id: int) -> None:
        standing = self._in_line.pop(endpoint_id, None)
        if standing is not None:
            self._desk.release(standing.ticket.request_idx)

    def _tell_demand(self, endpoint_id: int) -> None:
        """What waits here beyond the one that stands in the line."""
        standing = 1 if endpoint_id in self._in_line else 0
        total = self._backlog.total(endpoint_id)
        jobs = max(0, total.jobs - standing)
        cost = total.cost * jobs / total.jobs if total.jobs else 0.0
        self._desk.set_backlog(endpoint_id, jobs=jobs, cost=cost, oldest_at=total.oldest_at)

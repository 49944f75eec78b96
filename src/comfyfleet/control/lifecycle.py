"""Carry out what was decided for a worker: create, wake, stop, destroy, restart, update; each drains first.

Draining is an intent on the worker: routing gives it nothing new. `advance` looks each second which intents have
become free to act on (nothing booked any more, or the drain limit is over for a worker that is going away), and keeps
provider calls out of the reconciler's pass: a slow stop of one worker holds up nobody.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import anyio
import anyio.abc
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.desk import Desk
from comfyfleet.control.fleet.base import FleetProvider, FleetWorker, NoCapacity, Presence, WorkerSpec
from comfyfleet.control.fleet.needs import gpu_ram_wanted, gpus_wanted
from comfyfleet.control.ownership import NotOwner, Ownership
from comfyfleet.control.records import Endpoint, Workergroup, WorkerRow
from comfyfleet.control.scaling import Action, Verb
from comfyfleet.control.scores import Scores
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.ownership_table import Fenced
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import ACTIVE, INACTIVE, WORKER_TRANSITIONS, WorkerState
from comfyfleet.control.workers import Workers
from comfyfleet.ids import Ids
from comfyfleet.wire.errors import BadRequest, FleetError

log = structlog.get_logger()

# Work in flight on a worker whose endpoint is deleted gets this long to end.
DRAIN_LIMIT_S = 1800.0

# A process without a record may be one whose record is just being written.
UNRECORDED_S = 5.0

Environment = Callable[[Endpoint, Workergroup], Mapping[str, str]]


def worker_row(worker: Worker) -> WorkerRow:
    """What the store keeps of a worker."""
    body = msgspec.json.encode(worker).decode()
    return WorkerRow(id=worker.id, endpoint_id=worker.endpoint_id, workergroup_id=worker.group_id, body=body)


class Lifecycle:
    """Acts on workers through the provider. `tasks` must be set (`attach`) before anything is started or stopped."""

    def __init__(
        self,
        *,
        workers: Workers,
        desk: Desk,
        scores: Scores,
        catalog: Catalog,
        provider: FleetProvider | None,
        store: Store,
        environment: Environment,
        clock: Clock,
        ids: Ids,
        ownership: Ownership,
    ) -> None:
        self._ownership = ownership
        self._workers = workers
        self._desk = desk
        self._scores = scores
        self._catalog = catalog
        self._provider = provider
        self._store = store
        self._environment = environment
        self._clock = clock
        self._ids = ids
        self._tasks: anyio.abc.TaskGroup | None = None
        self._under_way: set[int] = set()
        self.on_no_capacity: Callable[[int, str], None] = lambda endpoint_id, why: None

    def attach(self, tasks: anyio.abc.TaskGroup) -> None:
        """The task group that owns slow provider calls."""
        self._tasks = tasks

    async def create(self, endpoint: Endpoint, group_id: int) -> int:
        """A new worker of a group; its id. Raises NoCapacity, with nothing left behind."""
        group = self._catalog.workergroup(group_id)
        assert self._provider is not None  # noqa: S101 - without a provider no group recruits
        if group is None:
            return 0
        now = self._clock.now()
        worker = Worker(
            id=await self._store.reserve("worker"),
            endpoint_id=endpoint.id,
            group_id=group_id,
            mtoken=self._ids.token(),
            incarnation=self._ids.request_id(),
            created_at=now,
            state_since=now,
            started_at=now,
            generation=group.update_generation,
        )
        self._workers.add(worker, now)
        try:
            # Written down before it exists: a control plane that is killed here leaves no worker that nobody knows.
            await self._store.put(worker_row(worker), fence=self._ownership.fence(endpoint.id))
            await self._provider.create(self._spec(worker))
        except BaseException:
            self._workers.remove(worker.id)
            raise
        if worker.id and (current := self._workers.get(worker.id)) and current.state is WorkerState.CREATING:
            self._workers.move(worker.id, WorkerState.LOADING, self._clock.now())
        return worker.id

    async def register(self, endpoint_id: int, group_id: int, worker_id: int | None = None) -> Worker:
        """A worker brought by hand: no provider starts or stops it; it is known by its token."""
        if worker_id is not None and await self._store.get(WorkerRow, worker_id) is not None:
            raise BadRequest(f"worker id {worker_id} is taken", field="id")
        now = self._clock.now()
        worker = Worker(
            id=worker_id if worker_id is not None else await self._store.reserve("worker"),
            endpoint_id=endpoint_id,
            group_id=group_id,
            mtoken=self._ids.token(),
            created_at=now,
            state=WorkerState.CREATING,
            state_since=now,
            is_foreign=True,
        )
        await self._store.put(worker_row(worker), fence=self._ownership.fence(endpoint_id))
        self._workers.add(worker, now, is_persisted=True)
        return worker

    def under_way(self) -> frozenset[int]:
        """Workers that a step of ours is at: what the provider says of them meanwhile is half the truth."""
        return frozenset(self._under_way)

    async def apply(self, action: Action) -> None:
        """Begin what was decided for one worker."""
        worker = self._workers.get(action.worker_id)
        now = self._clock.now()
        if worker is None:
            return
        if action.verb is Verb.KEEP:
            self._workers.change(worker.id, now, intent="")
        elif action.verb in (Verb.STOP, Verb.DESTROY):
            self._workers.change(worker.id, now, intent=str(action.verb))
            self._desk.regrant(worker.id)
        elif action.verb is Verb.UPDATE and worker.state is not WorkerState.STOPPED:
            self._workers.change(worker.id, now, intent="update")
            self._desk.regrant(worker.id)
        elif action.verb is Verb.UPDATE:
            self._restart(worker, WorkerState.UPDATE_STARTING)
        elif action.verb is Verb.WAKE:
            self._restart(worker, WorkerState.STARTING)
        elif action.verb is Verb.REBOOT and worker.state is WorkerState.ERROR:  # it may have recovered meanwhile
            self._restart(worker, WorkerState.REBOOTING)
        if (current := self._workers.get(worker.id)) is not None:
            self.advance(current)

    def advance(self, worker: Worker) -> None:
        """Act on what a worker is meant for, when nothing holds it back any more."""
        if worker.id in self._under_way or not self._ownership.owns(worker.endpoint_id):
            return
        if worker.state is WorkerState.STOPPING and not worker.intent:
            self._begin(worker.id, self._stop)  # a restart of the control plane interrupted it
        elif worker.state is WorkerState.DESTROYING:
            self._begin(worker.id, self._destroy)
        elif worker.intent and self._is_free(worker):
            self._end_drain(worker)

    def end_unknown(self, present: Mapping[int, FleetWorker]) -> None:
        """End what the provider runs and nobody has a record of."""
        for worker_id, found in present.items():
            is_new = found.presence is Presence.RUNNING and self._clock.now() - found.started_at < UNRECORDED_S
            if self._workers.get(worker_id) is None and not is_new:
                # No record of it: the call that made it lost its answer, or a record is gone. It would cost for ever.
                self._begin(worker_id, self._destroy)

    def _is_free(self, worker: Worker) -> bool:
        if worker.state is WorkerState.CREATING and not worker.is_foreign:
            return False  # the provider is at it
        if not self._workers.load(worker.id).is_leased:
            return True
        endpoint = self._catalog.endpoint(worker.endpoint_id)
        deleted_at = endpoint.deleted_at if endpoint is not None else 0.0
        return deleted_at is not None and self._clock.now() - deleted_at > DRAIN_LIMIT_S

    def _end_drain(self, worker: Worker) -> None:
        now = self._clock.now()
        if worker.is_foreign and worker.intent != "destroy":
            return  # out of routing; whoever brought it decides what runs there
        if worker.intent == "destroy":
            self._workers.move(worker.id, WorkerState.DESTROYING, now)
            self._begin(worker.id, self._destroy)
        elif worker.intent == "stop" and worker.state in INACTIVE:
            self._workers.change(worker.id, now, intent="")
        elif worker.intent == "stop" and worker.state is WorkerState.ERROR:
            self._workers.change(worker.id, now, intent="destroy")
        elif worker.intent == "stop":
            self._workers.move(worker.id, WorkerState.STOPPING, now)
            self._begin(worker.id, self._stop)
        elif worker.intent == "update" and worker.state is WorkerState.IDLE:
            self._workers.move(worker.id, WorkerState.UPDATE_READY, now)
            self._restart(worker, WorkerState.UPDATE_REBOOTING)
        elif worker.intent == "update":
            self._workers.change(worker.id, now, intent="")

    def _restart(self, worker: Worker, state: WorkerState) -> None:
        if worker.id in self._under_way:
            return  # a new life that nobody starts would disown the one that is being started: decided again soon
        now = self._clock.now()
        group = self._catalog.workergroup(worker.group_id)
        generation = group.update_generation if group is not None else worker.generation
        self._desk.lost(worker.id, self._workers.load(worker.id).clear())
        self._scores.forget(worker.id)
        self._workers.move(worker.id, state, now)
        self._workers.change(
            worker.id, now, generation=generation, intent="", started_at=now, incarnation=self._ids.request_id()
        )
        self._begin(worker.id, self._start_again)

    def _begin(self, worker_id: int, step: Callable[[int], Awaitable[None]]) -> None:
        if self._tasks is None or worker_id in self._under_way:
            return
        self._under_way.add(worker_id)
        self._tasks.start_soon(self._contained, worker_id, step, name=f"{step.__name__} worker {worker_id}")

    async def _contained(self, worker_id: int, step: Callable[[int], Awaitable[None]]) -> None:
        try:
            await self._confirm(worker_id)
            await step(worker_id)
        except (Fenced, NotOwner):
            log.info("worker.step_fenced", worker=worker_id, step=step.__name__)
        except (FleetError, OSError) as error:
            log.warning("worker.step_failed", worker=worker_id, step=step.__name__, why=str(error))
            worker = self._workers.get(worker_id)
            if worker is not None and worker.state in ACTIVE:
                self._workers.fail(worker_id, str(error), self._clock.now())
        finally:
            self._under_way.discard(worker_id)

    async def _confirm(self, worker_id: int) -> None:
        """Before a worker is touched: nobody else decides for it by now. Raises Fenced, NotOwner."""
        worker = self._workers.get(worker_id)
        if worker is not None and (fence := self._ownership.fence(worker.endpoint_id)) is not None:
            await self._store.put(worker_row(worker), fence=fence)

    async def _start_again(self, worker_id: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or self._provider is None:
            return
        # Written down before it runs: a control plane that is killed here would refuse what it started itself.
        await self._store.put(worker_row(worker))
        try:
            await self._provider.stop(worker_id)
            await self._provider.start(self._spec(worker))
        except NoCapacity as error:
            self._without_room(worker_id, error.message)

    def _without_room(self, worker_id: int, why: str) -> None:
        """No machine has room for it: no failure of the worker, which waits as it was."""
        worker, now = self._workers.get(worker_id), self._clock.now()
        if worker is None:
            return
        self.on_no_capacity(worker.endpoint_id, why)
        if WorkerState.STOPPING in WORKER_TRANSITIONS[worker.state]:
            self._workers.move(worker_id, WorkerState.STOPPING, now)
            self._workers.move(worker_id, WorkerState.STOPPED, now)
        elif worker.state in ACTIVE:
            self._workers.fail(worker_id, why, now, is_own_fault=False)

    async def _stop(self, worker_id: int) -> None:
        if self._provider is not None:
            await self._provider.stop(worker_id)
        worker = self._workers.get(worker_id)
        if worker is not None and worker.state is WorkerState.STOPPING:
            self._workers.move(worker_id, WorkerState.STOPPED, self._clock.now())

    async def _destroy(self, worker_id: int) -> None:
        if self._provider is not None:
            await self._provider.destroy(worker_id)
        self._desk.lost(worker_id, self._workers.remove(worker_id))
        self._scores.forget(worker_id)

    def _spec(self, worker: Worker) -> WorkerSpec:
        endpoint = self._catalog.endpoint(worker.endpoint_id)
        group = self._catalog.workergroup(worker.group_id)
        known = endpoint is not None and group is not None
        search = group.search_query if group is not None else {}
        return WorkerSpec(
            id=worker.id,
            mtoken=worker.mtoken,
            incarnation=worker.incarnation,
            environment=dict(self._environment(endpoint, group)) if known and endpoint and group else {},
            search_params=group.search_params if group is not None else "",
            search=search,
            gpu_ram_gb=gpu_ram_wanted(search),
            num_gpus=gpus_wanted(search),
        )

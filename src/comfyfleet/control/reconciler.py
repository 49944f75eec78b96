"""The loop between what is wanted and what is there: look, decide, act, record; each second, or when kicked.

It holds no rules: `checkup` says what is wrong with a worker, `autoscaler` what the fleet should be, `lifecycle` does
it. A decision that does something, or says something new, is stored with its inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import anyio
import msgspec
import structlog
from anyio.lowlevel import checkpoint

from comfyfleet.clock import Clock
from comfyfleet.control import breaker
from comfyfleet.control.autoscaler import decide
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.checkup import ailment
from comfyfleet.control.desk import Desk
from comfyfleet.control.fleet.base import FleetProvider, FleetWorker, NoCapacity, Presence
from comfyfleet.control.lifecycle import Lifecycle, worker_row
from comfyfleet.control.ownership import NotOwner, Ownership
from comfyfleet.control.records import DecisionRow, Endpoint, LogRow, WorkerRow
from comfyfleet.control.scaling import (
    Action,
    Decision,
    GroupFacts,
    Memory,
    ScalePolicy,
    ScalingInputs,
    Verb,
    WorkerFacts,
)
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.store.ownership_table import Fenced
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import BOOTING, WorkerState
from comfyfleet.control.workers import Workers

log = structlog.get_logger()

TICK_S = 1.0
STEERED_A_PASS = 50
WRITTEN_AT_ONCE = 64


class Reconciler:
    """One loop over all endpoints."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        workers: Workers,
        desk: Desk,
        lifecycle: Lifecycle,
        provider: FleetProvider | None,
        store: Store,
        clock: Clock,
        ownership: Ownership,
        boot_budget_s: float = 3600.0,
    ) -> None:
        self._ownership = ownership
        self._catalog = catalog
        self._workers = workers
        self._desk = desk
        self._lifecycle = lifecycle
        self._provider = provider
        self._store = store
        self._clock = clock
        self._boot_budget_s = boot_budget_s
        self._memories: dict[int, Memory] = {}
        self._recalled: set[int] = set()  # endpoints whose memory is as the last decision left it, or newer
        self._policies: dict[int, tuple[object, ...]] = {}
        self._seen: dict[int, tuple[WorkerState, int]] = {}  # state and failures at the last look
        self._said: dict[int, tuple[str, bool]] = {}  # what the last decision told, and whether spending was stopped
        self._group_perf: dict[int, float] = {}
        self._kicked = anyio.Event()
        self._pass = 0
        lifecycle.on_no_capacity = self._note_no_capacity

    def kick(self) -> None:
        """Look again at once."""
        self._kicked.set()

    async def run(self) -> None:
        """For ever. One bad pass is recorded and the next one comes."""
        while True:
            try:
                await self.step()
            except Exception:  # loop iteration boundary
                log.exception("reconciler.failed")
            with anyio.move_on_after(TICK_S):
                await self._kicked.wait()
            self._kicked = anyio.Event()

    async def step(self) -> None:
        """One pass over everything."""
        now = self._clock.now()
        were_under_way = self._lifecycle.under_way()
        present = await self._present()
        async for worker in self._workers.each():
            if self._workers.look(worker, now):
                log.info("worker.silent", worker=worker.id)
            self._lifecycle.advance(worker)
            if (current := self._workers.get(worker.id)) is not None:
                is_settled = worker.id not in were_under_way | self._lifecycle.under_way()
                self._check(current, present.get(worker.id), now, is_settled=is_settled)
        self._lifecycle.end_unknown(present)
        endpoints = self._catalog.endpoints()
        await self._recall(endpoints)
        self._pass += 1
        stride = 1 + len(endpoints) // STEERED_A_PASS
        for endpoint in endpoints:
            # With hundreds of endpoints a calm one has its turn every few seconds; one with a line always has.
            is_due = self._desk.queue.waiting_count(endpoint.id) or (self._pass + endpoint.id) % stride == 0
            if is_due and self._ownership.owns(endpoint.id):
                try:
                    await self._steer(endpoint)
                except (Fenced, NotOwner) as error:  # another's by now; nothing was written or done
                    log.info("reconciler.fenced", endpoint=endpoint.id, why=str(error))
                await checkpoint()  # a route call need not wait for the whole pass
        await self._persist()

    async def _recall(self, endpoints: Iterable[Endpoint]) -> None:
        """What decisions before this process, or of another, left behind: an open breaker stays open. No time has
        passed since then: nobody looked."""
        for endpoint in endpoints:
            if endpoint.id not in self._recalled and self._ownership.owns(endpoint.id):
                for row in await self._store.decisions(endpoint.id, limit=1):
                    left = msgspec.json.decode(row.outcome, type=Decision).memory
                    now = self._clock.now()
                    self._memories[endpoint.id] = msgspec.structs.replace(left, decided_at=now, over_since=0.0)
                self._recalled.add(endpoint.id)

    async def _present(self) -> dict[int, FleetWorker]:
        """What the provider has; of a fleet that several share, without the workers that others look after."""
        if self._provider is None:
            return {}
        present = {worker.id: worker for worker in await self._provider.list()}
        if not self._ownership.is_shared:
            return present
        for worker_id in [worker_id for worker_id in present if self._workers.get(worker_id) is None]:
            if await self._store.get(WorkerRow, worker_id) is not None:
                del present[worker_id]
        return present

    def forget(self, endpoint_id: int) -> None:
        """Another control plane decides for it."""
        self._memories.pop(endpoint_id, None)
        self._recalled.discard(endpoint_id)
        self._policies.pop(endpoint_id, None)
        self._said.pop(endpoint_id, None)

    def _check(self, worker: Worker, present: FleetWorker | None, now: float, *, is_settled: bool) -> None:
        """Find out if it died, fell silent or takes too long; learn from it if it became ready.

        is_settled: nothing was being done with it while the provider was asked; else it may well be seen stopped.
        """
        if not self._ownership.owns(worker.endpoint_id):
            return
        if present is not None and present.price_hour and present.price_hour != worker.price_hour:
            worker = self._workers.change(worker.id, now, price_hour=present.price_hour)
        if present is not None and present.gpu_name and not worker.gpu_name:
            worker = self._workers.change(worker.id, now, gpu_name=present.gpu_name)
        before, failures = self._seen.get(worker.id, (worker.state, worker.failures))
        group = self._catalog.workergroup(worker.group_id)
        problem = ailment(
            worker,
            present,
            has_provider=self._provider is not None,
            now=now,
            download_gb=group.gpu_ram if group is not None else 0.0,
        )
        if problem and is_settled:
            before, failures = worker.state, worker.failures
            lost = self._workers.load(worker.id).clear()
            has_lost_machine = present is not None and present.presence is Presence.LOST
            worker = self._workers.fail(worker.id, problem, now, is_own_fault=not has_lost_machine)
            self._desk.lost(worker.id, lost)
            log.warning("worker.failed", worker=worker.id, why=problem)
        if worker.perf:
            self._group_perf[worker.group_id] = worker.perf
        self._seen[worker.id] = worker.state, worker.failures
        if before is not worker.state or failures < worker.failures:
            self._learn(worker, before, now)

    def _learn(self, worker: Worker, before: WorkerState, now: float) -> None:
        memory = self._memories.get(worker.endpoint_id, Memory())
        # A start may fail within one pass, so the state before may well be that of the life before.
        if worker.state is WorkerState.ERROR and worker.loaded_at < worker.started_at and worker.failures:
            memory = breaker.note_failed_start(memory, worker.error_msg, now)
        elif worker.state is WorkerState.IDLE and before in BOOTING and worker.started_at:
            was_wake = before in (WorkerState.STARTING, WorkerState.UPDATE_STARTING)
            memory = breaker.note_ready(memory, took_s=now - worker.started_at, was_wake=was_wake)
        self._memories[worker.endpoint_id] = memory

    async def _steer(self, endpoint: Endpoint) -> None:
        """Decide for one endpoint and act."""
        inputs = self.inputs(endpoint)
        decision = decide(inputs)
        self._memories[endpoint.id] = decision.memory
        self._desk.reasons[endpoint.id] = decision.reason
        # A countdown in the text is nothing new to say.
        text = re.sub(r"[0-9.]+", "", decision.reason) if not decision.actions else decision.sentence
        said = text, bool(decision.memory.breaker_since)
        if decision.actions or self._said.get(endpoint.id) != said:
            self._said[endpoint.id] = said
            await self._record(endpoint, inputs, decision)
        for action in decision.actions:
            await self._act(endpoint, action)

    def inputs(self, endpoint: Endpoint) -> ScalingInputs:
        """Everything the decision reads, as values."""
        now = self._clock.now()
        groups = tuple(
            GroupFacts(
                id=group.id,
                generation=group.update_generation if group.is_updating else 0,
                test_workers=group.test_workers,
                perf=self._group_perf.get(group.id, 0.0),
                is_deleted=group.deleted_at is not None,
            )
            for group in self._catalog.workergroups(endpoint.id)
        )
        policy = scale_policy(endpoint)
        signature = (policy, tuple((group.id, group.generation) for group in groups))
        memory = self._memories.get(endpoint.id, Memory())
        if self._policies.get(endpoint.id, signature) != signature:
            memory = breaker.forgiven(memory)
        self._policies[endpoint.id] = signature
        return ScalingInputs(
            policy=policy,
            groups=groups if self._provider is not None else (),
            demand=self._desk.demand(endpoint.id),
            workers=tuple(self._facts(worker, now) for worker in self._workers.of_endpoint(endpoint.id)),
            memory=memory,
            now=now,
            boot_budget_s=self._boot_budget_s,
        )

    def _facts(self, worker: Worker, now: float) -> WorkerFacts:
        load = self._workers.load(worker.id)
        group = self._catalog.workergroup(worker.group_id)
        is_orphan = group is not None and group.deleted_at is not None
        return WorkerFacts(
            id=worker.id,
            group_id=worker.group_id,
            state=worker.state,
            state_since=worker.state_since,
            created_at=worker.created_at,
            perf=worker.perf,
            is_leased=load.is_leased,
            backlog=load.backlog(now),
            backlog_jobs=load.count,
            last_work_at=load.last_work_at,
            intent="destroy" if is_orphan and worker.intent == "destroy" else worker.intent,
            failures=worker.failures,
            error=worker.error_msg,
            is_foreign=worker.is_foreign,
            generation=worker.generation,
            price_hour=worker.price_hour,
            stage=worker.stage,
        )

    async def _act(self, endpoint: Endpoint, action: Action) -> None:
        try:
            if action.verb is Verb.CREATE:
                await self._lifecycle.create(endpoint, action.group_id)
            else:
                await self._lifecycle.apply(action)
        except NoCapacity as error:
            self._note_no_capacity(endpoint.id, error.message)

    def _note_no_capacity(self, endpoint_id: int, why: str) -> None:
        memory = self._memories.get(endpoint_id, Memory())
        self._memories[endpoint_id] = breaker.note_no_capacity(memory, why, self._clock.now())

    async def _record(self, endpoint: Endpoint, inputs: ScalingInputs, decision: Decision) -> None:
        now = inputs.now
        log.info("fleet.decided", endpoint=endpoint.endpoint_name, decision=decision.sentence)
        await self._store.add_decision(
            DecisionRow(
                id=await self._store.reserve("decision"),
                endpoint_id=endpoint.id,
                at=now,
                sentence=decision.sentence,
                inputs=msgspec.json.encode(inputs).decode(),
                outcome=msgspec.json.encode(decision).decode(),
            ),
            fence=self._ownership.fence(endpoint.id),
        )
        line = LogRow(endpoint_id=endpoint.id, workergroup_id=0, at=now, level="info0", text=decision.sentence)
        await self._store.add_logs([line])

    async def _persist(self) -> None:
        changed, gone = self._workers.take_changes()
        for at in range(0, len(changed), WRITTEN_AT_ONCE):
            async with anyio.create_task_group() as writes:  # the store commits together what comes together
                for worker in changed[at : at + WRITTEN_AT_ONCE]:
                    writes.start_soon(self._save, worker)
        for position, worker_id in enumerate(gone):
            self._seen.pop(worker_id, None)
            try:
                await self._store.drop(WorkerRow, worker_id)
            except ConnectionLost:
                self._workers.still_stored(gone[position:])
                raise

    async def _save(self, worker: Worker) -> None:
        try:
            await self._store.put(worker_row(worker), fence=self._ownership.fence(worker.endpoint_id))
        except (Fenced, NotOwner, ConnectionLost):
            self._workers.unsaved(worker.id)  # to be said again, if it is ours then and the database there


def scale_policy(endpoint: Endpoint) -> ScalePolicy:
    """The endpoint's scaling parameters; one being deleted is `destroyed`."""
    return ScalePolicy(
        endpoint_id=endpoint.id,
        state="destroyed" if endpoint.deleted_at is not None else str(endpoint.endpoint_state),
        min_load=endpoint.min_load,
        target_util=endpoint.target_util,
        cold_mult=endpoint.cold_mult,
        min_cold_load=endpoint.min_cold_load,
        cold_workers=endpoint.cold_workers,
        max_workers=endpoint.max_workers,
        max_queue_time=endpoint.max_queue_time,
        target_queue_time=endpoint.target_queue_time,
        inactivity_timeout=endpoint.inactivity_timeout,
    )

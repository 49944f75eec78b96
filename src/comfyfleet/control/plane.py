"""The routing half of the control plane, put together: registry, desk, reports, reconciler, and their routes.

The composition root of this room. `load` reads what outlives a restart, `run` is the loops, `routes` the HTTP doors;
other rooms use `desk` (a worker for a job), `workers` (what there is) and `lifecycle` (what to do with it).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import anyio
import msgspec
import structlog
from starlette.routing import BaseRoute

from comfyfleet.clock import Clock
from comfyfleet.control.api.foreign_workers import ForeignWorkerApi
from comfyfleet.control.api.reports import ReportApi
from comfyfleet.control.api.route import RouteApi
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.desk import Desk
from comfyfleet.control.fleet.base import FleetProvider
from comfyfleet.control.keys import Keyring
from comfyfleet.control.learned_cost import LearnedCost
from comfyfleet.control.lifecycle import Environment, Lifecycle
from comfyfleet.control.limits import Allowance, Limits
from comfyfleet.control.numbers import Numbers
from comfyfleet.control.ownership import SOLE_OWNER, Ownership
from comfyfleet.control.reconciler import Reconciler
from comfyfleet.control.records import DemandRow, LearnedRow, WorkerRow
from comfyfleet.control.reports import Reports
from comfyfleet.control.roll_call import TRUSTED_S, answering
from comfyfleet.control.scores import Scores
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.tickets import Tickets
from comfyfleet.control.worker import Worker
from comfyfleet.control.workers import Workers, revived
from comfyfleet.ids import Ids

log = structlog.get_logger()

SWEEP_S = 1.0
SAVE_LEARNED_S = 10.0


class RoutingPlane:
    """Everything between a request that wants a worker and a fleet that has one."""

    def __init__(
        self,
        *,
        data_dir: Path,
        catalog: Catalog,
        keys: Keyring,
        store: Store,
        provider: FleetProvider | None,
        environment: Environment,
        clock: Clock,
        ids: Ids,
        boot_budget_s: float = 3600.0,
        ownership: Ownership = SOLE_OWNER,
    ) -> None:
        self._ownership = ownership
        self.tickets = Tickets.open(data_dir)
        self.workers = Workers()
        self.learned = LearnedCost()
        self.workers.swap_s_of = self.learned.swap_s
        self.scores = Scores()
        self.limits = Limits(keys.limits)
        self._numbers = Numbers(partial(store.reserve, "request_idx"))
        self._reqnums = Numbers(partial(store.reserve, "reqnum"))
        self._store = store
        self._clock = clock
        self.provider = provider
        self.desk = Desk(
            workers=self.workers,
            tickets=self.tickets,
            numbers=self._numbers,
            reqnums=self._reqnums,
            allowance=Allowance(self.limits, keys.limits),
            clock=clock,
            ids=ids,
            owns=ownership.owns,
        )
        self.lifecycle = Lifecycle(
            workers=self.workers,
            desk=self.desk,
            scores=self.scores,
            catalog=catalog,
            provider=provider,
            store=store,
            environment=environment,
            clock=clock,
            ids=ids,
            ownership=ownership,
        )
        self.reconciler = Reconciler(
            catalog=catalog,
            workers=self.workers,
            desk=self.desk,
            lifecycle=self.lifecycle,
            provider=provider,
            store=store,
            clock=clock,
            ownership=ownership,
            boot_budget_s=boot_budget_s,
        )
        self.desk.on_first_wait = self.reconciler.kick
        self.reports = Reports(
            workers=self.workers,
            desk=self.desk,
            scores=self.scores,
            learned=self.learned,
            limits=self.limits,
            clock=clock,
            kick=self.reconciler.kick,
        )
        self._route_api = RouteApi(
            desk=self.desk,
            catalog=catalog,
            keys=keys,
            tickets=self.tickets,
            learned=self.learned,
            clock=clock,
            ids=ids,
        )
        self._report_api = ReportApi(self.reports)
        self._foreign_api = ForeignWorkerApi(
            lifecycle=self.lifecycle, workers=self.workers, catalog=catalog, keys=keys, provider=provider
        )

    def routes(self) -> list[BaseRoute]:
        """`/route/`, `/pubkey/`, `/pubkey/ed25519`, `/worker_status/`, `/delete_requests/`, and workers by hand."""
        return [*self._route_api.routes(), *self._report_api.routes(), *self._foreign_api.routes()]

    async def load(self) -> None:
        """Before the first request: workers of an earlier run, and numbers to hand out."""
        if not self._ownership.is_shared:
            now = self._clock.now()
            for row in await self._store.all(WorkerRow):
                worker = msgspec.json.decode(row.body, type=Worker)
                self.workers.add(revived(worker, now), now, is_persisted=True)
        self.learned.load(await self._store.all(LearnedRow))
        self.desk.meters.load(await self._store.all(DemandRow))
        await self._refill()
        log.info("routing.loaded", workers=len(self.workers.all()))

    async def load_endpoints(self, endpoint_ids: Collection[int]) -> None:
        """Endpoints that become this replica's: their workers, and that other replicas numbered requests meanwhile."""
        wanted = frozenset(endpoint_ids)
        for endpoint_id in wanted:
            self.desk.forget(endpoint_id)  # whoever asked here before it was ours asks again
        rows = [row for row in await self._store.all(WorkerRow) if row.endpoint_id in wanted]
        workers = [msgspec.json.decode(row.body, type=Worker) for row in rows]
        there = await answering(workers)
        now = self._clock.now()
        for worker in workers:
            trusted_s = TRUSTED_S if worker.id in there else 0.0
            self.workers.add(revived(worker, now, trusted_s=trusted_s), now, is_persisted=True)
        self.learned.load(row for row in await self._store.all(LearnedRow) if row.endpoint_id in wanted)
        self.desk.meters.load(row for row in await self._store.all(DemandRow) if row.id in wanted)
        self._numbers.first = await self._store.reserve("request_idx")

    def begin(self, endpoint_id: int) -> None:
        """An endpoint is this replica's from now on."""
        log.info("routing.begins", endpoint=endpoint_id, workers=len(self.workers.of_endpoint(endpoint_id)))
        self.reconciler.kick()

    def drop(self, endpoint_id: int) -> None:
        """An endpoint is another replica's."""
        self.desk.forget(endpoint_id)
        self.reconciler.forget(endpoint_id)
        self.workers.forget(endpoint_id)

    async def run(self) -> None:
        """The loops, until cancelled."""
        async with anyio.create_task_group() as loops:
            self.lifecycle.attach(loops)
            loops.start_soon(self.reconciler.run, name="reconciler")
            loops.start_soon(self._sweep, name="route queue sweep")
            loops.start_soon(self._keep_learned, name="learned costs")

    async def close(self, *, keep_workers: bool) -> None:
        """After `run` ended: end the provider's workers, or leave them for the next control plane."""
        await self.save_learned()
        if self.provider is not None:
            await self.provider.close(keep_running=keep_workers)

    async def _sweep(self) -> None:
        while True:
            try:
                self.desk.sweep()
                await self._refill()
            except Exception:  # loop iteration boundary
                log.exception("sweep.failed")
            await self._clock.sleep(SWEEP_S)

    async def _keep_learned(self) -> None:
        while True:
            await self._clock.sleep(SAVE_LEARNED_S)
            try:
                await self.save_learned()
            except Exception:  # loop iteration boundary
                log.exception("learned.not_saved")

    async def save_learned(self) -> None:
        """What jobs have shown of their shapes, and what arrived, since the last time."""
        (changed, forgotten), demands = self.learned.take_changes(), self.desk.meters.take_changes()
        try:
            for row in changed:
                await self._store.put(row)
            for row_id in forgotten:
                await self._store.drop(LearnedRow, row_id)
            for demand in demands:
                await self._store.put(demand)
        except ConnectionLost:
            self.learned.unsaved([*(row.id for row in changed), *forgotten])
            self.desk.meters.unsaved(demands)
            raise

    async def _refill(self) -> None:
        await self._numbers.refill()
        await self._reqnums.refill()

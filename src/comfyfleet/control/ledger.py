"""The usage ledger: seconds per worker and billing state, per job and per key, each with its price. Append-only.

A worker that is ready, loading or starting pays for its GPU, idle or not; an inactive one pays for its storage; one
that is pending, broken or going pays nothing (the documents' table).
"""

from __future__ import annotations

import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.job_run import RunOutcome
from comfyfleet.control.limits import DAY_S, Limits
from comfyfleet.control.records import UsageRow
from comfyfleet.control.reports import KeyUse
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.control.workers import Workers

log = structlog.get_logger()

FLUSH_EVERY_S = 15.0
_HOUR_S = 3600.0
# Rows that say what a key used; the others say what a worker cost.
_OF_KEYS = ("job", "request")

_FREE = frozenset({WorkerState.PENDING, WorkerState.ERROR, WorkerState.DESTROYING})
_STORAGE = frozenset({WorkerState.CREATING, WorkerState.CREATED, WorkerState.STOPPING, WorkerState.STOPPED})


def billed_as(state: WorkerState) -> str:
    """gpu, storage, or "" for nothing."""
    if state in _FREE:
        return ""
    return "storage" if state in _STORAGE else "gpu"


class Ledger:
    """Adds rows while the control plane runs; a time when it did not is nobody's."""

    def __init__(
        self,
        *,
        store: Store,
        workers: Workers,
        limits: Limits,
        clock: Clock,
        price_gpu_hour: float,
        price_storage_hour: float,
    ) -> None:
        self._store = store
        self._workers = workers
        self._limits = limits
        self._clock = clock
        self._price_s = {"gpu": price_gpu_hour / 3600.0, "storage": price_storage_hour / 3600.0}
        self._counted_at: dict[int, tuple[float, str]] = {}
        self._rows: list[UsageRow] = []

    async def load(self) -> None:
        """At start, before anybody is served: what each key used in the last day, hour by hour, for its quota."""
        now = self._clock.now()
        for hours_ago in range(round(DAY_S / _HOUR_S), 0, -1):
            since = now - hours_ago * _HOUR_S
            sums = await self._store.usage(since=since, until=since + _HOUR_S)
            used: dict[str, float] = {}
            for row in sums:
                if row.kind in _OF_KEYS and row.scope:
                    used[row.scope] = used.get(row.scope, 0.0) + row.seconds
            self._limits.remember(used, since + _HOUR_S)

    def job_ended(self, outcome: RunOutcome) -> None:
        """A job's seconds, on its key."""
        if outcome.status is None:
            return
        job, now = outcome.job, self._clock.now()
        self._limits.used_seconds(job.scope, outcome.seconds, now)
        self._rows.append(
            UsageRow(
                endpoint_id=job.endpoint_id,
                workergroup_id=0,
                worker_id=job.worker_id or 0,
                scope=job.scope,
                kind="job",
                started_at=now - outcome.seconds,
                seconds=outcome.seconds,
                price=outcome.seconds * self._gpu_price_s(self._workers.get(job.worker_id or 0)),
            )
        )

    def request_ended(self, use: KeyUse) -> None:
        """A routed request's seconds, on its key (whose quota they are taken from already)."""
        self._rows.append(
            UsageRow(
                endpoint_id=use.worker.endpoint_id,
                workergroup_id=use.worker.group_id,
                worker_id=use.worker.id,
                scope=use.scope,
                kind="request",
                started_at=use.until - use.seconds,
                seconds=use.seconds,
                price=use.seconds * self._gpu_price_s(use.worker),
            )
        )

    def _gpu_price_s(self, worker: Worker | None) -> float:
        """Its machine's price per second where that is known."""
        return (worker.price_hour / 3600.0 if worker is not None else 0.0) or self._price_s["gpu"]

    def count(self) -> None:
        """Add what each worker has used since the last count; the state then held is what is billed."""
        now = self._clock.now()
        seen: dict[int, tuple[float, str]] = {}
        for worker in self._workers.all():
            since, kind = self._counted_at.get(worker.id, (now, ""))
            if kind and now > since:
                price_s = worker.price_hour / 3600.0 if kind == "gpu" and worker.price_hour else self._price_s[kind]
                self._rows.append(
                    UsageRow(
                        endpoint_id=worker.endpoint_id,
                        workergroup_id=worker.group_id,
                        worker_id=worker.id,
                        scope="",
                        kind=kind,
                        started_at=since,
                        seconds=now - since,
                        price=(now - since) * price_s,
                    )
                )
            seen[worker.id] = (now, billed_as(worker.state))
        self._counted_at = seen

    async def flush(self) -> None:
        rows, self._rows = self._rows, []
        try:
            await self._store.add_usage(rows)
        except ConnectionLost:
            self._rows = [*rows, *self._rows]
            raise

    async def run(self) -> None:
        """Count each second, save every now and then."""
        saved_at = self._clock.now()
        while True:
            await self._clock.sleep(1.0)
            try:
                self.count()
                if self._clock.now() - saved_at >= FLUSH_EVERY_S:
                    saved_at = self._clock.now()
                    self._rows = merged(self._rows)
                    await self.flush()
            except Exception:  # one iteration
                log.exception("ledger.failed")


def merged(rows: list[UsageRow]) -> list[UsageRow]:
    """One row where the same worker went on in the same state, or for the same key: seconds and price add up."""
    sums: dict[tuple[int, str, str], UsageRow] = {}
    jobs = []
    for row in rows:
        if row.kind == "job":
            jobs.append(row)
            continue
        before = sums.get((row.worker_id, row.kind, row.scope))
        if before is None:
            sums[row.worker_id, row.kind, row.scope] = row
            continue
        sums[row.worker_id, row.kind, row.scope] = UsageRow(
            endpoint_id=row.endpoint_id,
            workergroup_id=row.workergroup_id,
            worker_id=row.worker_id,
            scope=row.scope,
            kind=row.kind,
            started_at=before.started_at,
            seconds=before.seconds + row.seconds,
            price=before.price + row.price,
        )
    return [*sums.values(), *jobs]

"""Prometheus metrics of the control plane, read from the live state when somebody asks. Nothing is counted twice."""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from comfyfleet.control.catalog import Catalog
from comfyfleet.control.store.base import Store
from comfyfleet.control.workers import Workers


class Metrics:
    """Counters for what happened since the start, gauges filled at each reading."""

    def __init__(self, *, catalog: Catalog, workers: Workers, store: Store) -> None:
        self._catalog = catalog
        self._workers = workers
        self._store = store
        self._registry = CollectorRegistry()
        self.jobs_submitted = Counter(
            "comfyfleet_jobs_submitted", "Durable jobs accepted", ["endpoint"], registry=self._registry
        )
        self.jobs_finished = Counter(
            "comfyfleet_jobs_finished", "Durable jobs ended", ["endpoint", "status"], registry=self._registry
        )
        self.job_wait_s = Histogram(
            "comfyfleet_job_wait_seconds",
            "From acceptance to the first lease",
            ["endpoint"],
            buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200),
            registry=self._registry,
        )
        self.leases_lost = Counter(
            "comfyfleet_leases_lost",
            "Leases whose worker did not bring the job back",
            ["endpoint"],
            registry=self._registry,
        )
        self._workers_gauge = Gauge(
            "comfyfleet_workers", "Workers by state", ["endpoint", "state"], registry=self._registry
        )
        self._waiting_jobs = Gauge(
            "comfyfleet_jobs_waiting", "Durable jobs waiting", ["endpoint"], registry=self._registry
        )
        self._waiting_cost = Gauge(
            "comfyfleet_jobs_waiting_cost", "Load units waiting", ["endpoint"], registry=self._registry
        )

    async def render(self) -> bytes:
        """The text page."""
        for gauge in (self._workers_gauge, self._waiting_jobs, self._waiting_cost):
            gauge.clear()
        names = {endpoint.id: endpoint.endpoint_name for endpoint in self._catalog.endpoints()}
        states = Tally((worker.endpoint_id, str(worker.state)) for worker in self._workers.all())
        for (endpoint_id, state), count in states.items():
            self._workers_gauge.labels(names.get(endpoint_id, str(endpoint_id)), state).set(count)
        for waiting in await self._store.waiting():
            name = names.get(waiting.endpoint_id, str(waiting.endpoint_id))
            self._waiting_jobs.labels(name).inc(waiting.jobs)
            self._waiting_cost.labels(name).inc(waiting.cost)
        return generate_latest(self._registry)

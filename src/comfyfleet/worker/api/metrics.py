"""Prometheus: counters that the service feeds, and gauges read when somebody scrapes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from comfyfleet.wire.jobs import RUN_FINAL
from comfyfleet.worker.engines.pool import EngineState
from comfyfleet.worker.job import Job
from comfyfleet.worker.service import JobService

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class WorkerMetrics:
    """A registry of its own, so that two workers in one process (tests) do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Counter("comfyfleet_jobs_total", "Finished jobs.", ["status"], registry=self.registry)
        self._ended = {status: self.jobs.labels(status.value) for status in RUN_FINAL}
        self.faults = Counter("comfyfleet_job_faults_total", "Faults of runs.", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "comfyfleet_job_seconds",
            "From acceptance to the end.",
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self.waiting = Gauge("comfyfleet_jobs_waiting", "Jobs that no engine has yet.", registry=self.registry)
        self.live = Gauge("comfyfleet_jobs_live", "Accepted jobs without an end.", registry=self.registry)
        self.engines_ready = Gauge("comfyfleet_engines_ready", "Engines that take work.", registry=self.registry)
        self.engine_restarts = Gauge("comfyfleet_engine_restarts", "Engine restarts so far.", registry=self.registry)

    def watch(self, service: JobService) -> None:
        """Read the gauges from `service` at each scrape."""
        self.waiting.set_function(lambda: service.queue_view().waiting)
        self.live.set_function(lambda: len(service.live_jobs()))
        self.engines_ready.set_function(lambda: sum(slot.state is EngineState.READY for slot in service.engines))
        self.engine_restarts.set_function(lambda: sum(slot.restarts for slot in service.engines))

    def finished(self, job: Job, seconds: float) -> None:
        self._ended[job.status].inc()
        self.seconds.observe(seconds)
        for kind in job.earlier_faults:
            self.faults.labels(kind.value).inc()
        if job.fault is not None and job.fault not in job.earlier_faults:
            self.faults.labels(job.fault.value).inc()

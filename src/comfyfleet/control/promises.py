"""The GPU-seconds that accepted durable jobs will take: what waits and runs, by the usual score of its endpoint.

Predictions, for a key's quota: what a job really took is known, and counted, at its end.
"""

from __future__ import annotations

import statistics

from comfyfleet.control.backlog import Backlog
from comfyfleet.control.workers import Workers

# Where no worker's score is known yet: load units are seconds then, as for a GPU that needs 100 s for the benchmark.
UNKNOWN_SCORE = 1.0


class Promises:
    """Over the job sums and the registry, both of which others keep up."""

    def __init__(self, backlog: Backlog, workers: Workers) -> None:
        self._backlog = backlog
        self._workers = workers

    def of_scope(self, scope: str) -> float:
        """Seconds that a key's accepted jobs will take, waiting and running ones."""
        return sum(self.seconds(endpoint_id, cost) for endpoint_id, cost in self._backlog.open_costs(scope))

    def seconds(self, endpoint_id: int, cost: float) -> float:
        """How long work of that cost takes there."""
        scores = [worker.perf for worker in self._workers.of_endpoint(endpoint_id) if worker.perf > 0]
        return cost / (statistics.median(scores) if scores else UNKNOWN_SCORE)

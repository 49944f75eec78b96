"""Does the benchmark's score still hold? Real jobs of the benchmark's own shape say so, and cost nothing.

The engine's seconds for the last such jobs are compared with the median of the measured rounds. Only slower counts: a
real job may owe its speed to the engine's cache (an unchanged prompt, a repeated seed), so a fast one proves nothing.
A round includes the worker's own work around the engine, so the comparison never doubts a score without cause.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from comfyfleet.worker.agent.benchmark import DRIFT_FLAGGED

ENOUGH_JOBS = 5
KEPT_JOBS = 20


def drift_of_jobs(jobs_s: Sequence[float], median_s: float) -> str:
    """Why the score is doubted, or "". jobs_s: engine seconds of jobs; median_s: of the benchmark's rounds."""
    if len(jobs_s) < ENOUGH_JOBS or median_s <= 0:
        return ""
    drift = statistics.median(jobs_s) / median_s - 1.0
    if drift <= DRIFT_FLAGGED:
        return ""
    return f"its last {len(jobs_s)} jobs like the benchmark ran {drift:.0%} slower than its median of {median_s:.2f} s"


class DriftWatch:
    """The last jobs of one shape. `flag` follows them both ways: a card that has cooled down is trusted again."""

    def __init__(self, *, shape: str, median_s: float) -> None:
        self._shape = shape
        self._median_s = median_s
        self._jobs_s: deque[float] = deque(maxlen=KEPT_JOBS)

    def ran(self, shape: str, engine_s: float | None) -> None:
        """A job completed. engine_s None: the engine did not say, or answered from its cache."""
        if shape == self._shape and engine_s:
            self._jobs_s.append(engine_s)

    @property
    def flag(self) -> str:
        return drift_of_jobs(self._jobs_s, self._median_s)

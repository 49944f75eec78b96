"""The living score: the benchmark's at first, then corrected by real jobs, compared with peers of the same GPU.

A job's slowness is its seconds times the worker's score over its cost: 1.0 where cost and score are right. Costs are
guesses, but all peers get the same guesses, so a worker is judged by its slowness over the group's (low) median. One
that is more than 20 % slower is flagged (the documents: it may be heat), and routing gives a flagged one less.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

import msgspec

from comfyfleet.control.worker import Worker

TOLERANCE = 0.20
ENOUGH_JOBS = 5
KEPT_JOBS = 20
# A correction stays within these factors of the benchmark, whatever strange jobs say.
CORRECTION = (0.25, 4.0)
# Small corrections are noise.
DEAD_BAND = 0.05


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """living_perf: load units per second, 0 where nothing corrects the benchmark. flag: why it is doubted, or ""."""

    worker_id: int
    living_perf: float
    flag: str


class Scores:
    """The last jobs' slowness per worker."""

    def __init__(self) -> None:
        self._slowness: dict[int, deque[float]] = {}

    def ran(self, worker: Worker, *, cost: float, seconds: float) -> None:
        """A real job finished there."""
        if worker.measured_perf > 0:
            kept = self._slowness.setdefault(worker.id, deque(maxlen=KEPT_JOBS))
            kept.append(seconds * worker.measured_perf / cost)

    def forget(self, worker_id: int) -> None:
        self._slowness.pop(worker_id, None)

    def judge(self, workers: Iterable[Worker]) -> list[Verdict]:
        """One verdict for each worker that has a score."""
        known = [
            (
                worker,
                statistics.median(kept) if len(kept := self._slowness.get(worker.id, deque())) >= ENOUGH_JOBS else 0,
            )
            for worker in workers
            if worker.measured_perf > 0
        ]
        return judged(known)


def judged(known: list[tuple[Worker, float]]) -> list[Verdict]:
    """Pure: workers with their slowness (0: too few jobs) to verdicts. Peers share a GPU name; "" has no peers."""
    groups: dict[str, list[tuple[Worker, float]]] = {}
    for worker, slowness in known:
        groups.setdefault(worker.gpu_name, []).append((worker, slowness))
    verdicts = []
    for gpu_name, group in groups.items():
        for worker, slowness in group:
            peers = [entry for entry in group if entry[0] is not worker] if gpu_name else []
            verdicts.append(_verdict(worker, slowness, peers))
    return verdicts


def _verdict(worker: Worker, slowness: float, peers: list[tuple[Worker, float]]) -> Verdict:
    if not peers:
        return Verdict(worker_id=worker.id, living_perf=0.0, flag="")
    usual_score = statistics.median(peer.measured_perf for peer, _ in peers)
    of_peers = [of_peer for _, of_peer in peers if of_peer]
    # Its own counts too: two that differ would each be corrected by the other else, one up and one down.
    usual_slowness = statistics.median_low([*of_peers, slowness]) if of_peers and slowness else 0.0
    correction = 1.0
    if slowness and usual_slowness:
        correction = min(max(usual_slowness / slowness, CORRECTION[0]), CORRECTION[1])
        if abs(correction - 1.0) < DEAD_BAND:
            correction = 1.0
    living = worker.measured_perf * correction
    flag = ""
    if living < usual_score * (1 - TOLERANCE):
        percent = round(100 * (1 - living / usual_score))
        source = "its jobs" if correction < 1 else "its benchmark"
        flag = f"{percent} % slower than its peers with the same GPU, by {source}"
    return Verdict(worker_id=worker.id, living_perf=0.0 if correction == 1.0 else living, flag=flag)

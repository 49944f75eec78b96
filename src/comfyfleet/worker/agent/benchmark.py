"""The benchmark's decisions and its cache. Running a round is the caller's business.

Score = 100 / median seconds of a round: one warm-up, then rounds until the median is stable or time is up. The best
round is not used: one lucky round would promise what the worker cannot keep. A failed benchmark is an error with its
cause, never a score of 0.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from comfyfleet.wire.generation import RANDOM_INT
from comfyfleet.wire.workflow import Graph, is_link

MIN_ROUNDS = 2
MAX_ROUNDS = 8
STABLE_WITHIN = 0.05
DRIFT_FLAGGED = 0.20
SEED_INPUTS = frozenset({"seed", "noise_seed"})


class BenchmarkKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a score holds for; a change of any of these means measuring again."""

    graph_digest: str
    gpu_name: str
    engine_version: str
    template: str
    engines: int = 1


class BenchmarkScore(msgspec.Struct, frozen=True, kw_only=True):
    """score: load units per second. rounds_s: the measured rounds, warm-up left out. is_stale: real jobs denied it."""

    key: BenchmarkKey
    score: float
    median_s: float
    rounds_s: tuple[float, ...]
    measured_at: float
    is_stale: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchmarkFailed(Exception):
    """Why there is no score."""

    cause: str

    def __str__(self) -> str:
        return self.cause


def graph_digest(graph: dict[str, Any]) -> str:
    """SHA-256 of the canonical graph, seeds as they stand (`__RANDOM_INT__` included)."""
    return hashlib.sha256(json.dumps(graph, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def wants_another_round(rounds_s: Sequence[float], *, elapsed_s: float, limit_s: float) -> bool:
    """Whether the median is not yet known well enough, and there is time for one more round like the last."""
    if len(rounds_s) < MIN_ROUNDS:
        # At least one measured round, however slow the machine: without it there is no score at all.
        return not rounds_s or elapsed_s + rounds_s[-1] <= limit_s
    if len(rounds_s) >= MAX_ROUNDS or elapsed_s + rounds_s[-1] > limit_s:
        return False
    median_s = statistics.median(rounds_s)
    near = sum(abs(round_s - median_s) <= STABLE_WITHIN * median_s for round_s in rounds_s)
    return near < max(MIN_ROUNDS, len(rounds_s) // 2 + 1)


def score_of(key: BenchmarkKey, rounds_s: Sequence[float], *, engines: int = 1, now: float) -> BenchmarkScore:
    """100 / median, times the engines that rendered a round side by side.

    Raises BenchmarkFailed for no rounds, or rounds of no length.
    """
    if not rounds_s:
        raise BenchmarkFailed(cause="no benchmark round was completed")
    median_s = statistics.median(rounds_s)
    if median_s <= 0:
        raise BenchmarkFailed(cause="the benchmark took no time: its outputs came from a cache")
    return BenchmarkScore(
        key=key, score=engines * 100.0 / median_s, median_s=median_s, rounds_s=tuple(rounds_s), measured_at=now
    )


def drift_flag(median_s: float, known_median_s: float | None) -> str:
    """Why this GPU is suspect: more than 20 % from the known median of the same GPU; "" when it is not."""
    if known_median_s is None or known_median_s <= 0:
        return ""
    drift = median_s / known_median_s - 1.0
    if abs(drift) <= DRIFT_FLAGGED:
        return ""
    word = "slower" if drift > 0 else "faster"
    return f"{abs(drift):.0%} {word} than this GPU's known median of {known_median_s:.2f} s"


class ScoreCache:
    """Scores by key in one JSON file of the worker's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: BenchmarkKey) -> BenchmarkScore | None:
        """The score that holds for `key`; None where there is none, or it has drifted away."""
        return next((score for score in self._all() if score.key == key and not score.is_stale), None)

    def known_median_s(self, key: BenchmarkKey) -> float | None:
        """Median over what was measured for this graph on this GPU, whatever the engine version or template."""
        same = [
            s.median_s for s in self._all() if (s.key.graph_digest, s.key.gpu_name) == (key.graph_digest, key.gpu_name)
        ]
        return statistics.median(same) if same else None

    def put(self, score: BenchmarkScore) -> None:
        self._write([*[other for other in self._all() if other.key != score.key][-31:], score])

    def distrust(self, key: BenchmarkKey) -> None:
        """The next start measures again. The median stays known, so that a machine that got slow is flagged then."""
        self._write([msgspec.structs.replace(one, is_stale=one.is_stale or one.key == key) for one in self._all()])

    def _write(self, scores: list[BenchmarkScore]) -> None:
        staging = self._path.with_suffix(".part")
        staging.write_bytes(msgspec.json.encode(scores))
        staging.replace(self._path)

    def _all(self) -> list[BenchmarkScore]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[BenchmarkScore])
        except (OSError, ValueError):
            return []  # absent, broken or from another version: measuring again is always right


def with_random_seeds(graph: Graph) -> Graph:
    """The graph with every literal seed replaced, so that no round can be answered from a cache."""
    return {
        node_id: {
            **node,
            "inputs": {
                name: RANDOM_INT if name in SEED_INPUTS and not is_link(value) else value
                for name, value in node["inputs"].items()
            },
        }
        for node_id, node in graph.items()
    }

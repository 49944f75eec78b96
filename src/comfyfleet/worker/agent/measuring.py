"""Run the benchmark: rounds through the worker's own pipeline, each a line in the log, until the score is known.

A cached score for the same graph, GPU, engine and template is used as it is; anything else is measured.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.agent.benchmark import (
    BenchmarkFailed,
    BenchmarkKey,
    BenchmarkScore,
    ScoreCache,
    drift_flag,
    score_of,
    wants_another_round,
)

log = structlog.get_logger()

DEFAULT_LIMIT_S = 600.0

RunRound = Callable[[Graph], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A score, whether it came from the cache, and why this machine is suspect ("" when it is not)."""

    score: BenchmarkScore
    is_cached: bool
    flag: str


async def measure(
    graph: Graph,
    key: BenchmarkKey,
    *,
    run_round: RunRound,
    engines: int = 1,
    cache: ScoreCache,
    clock: Clock,
    limit_s: float = DEFAULT_LIMIT_S,
    on_round: Callable[[str], None] = lambda detail: None,
) -> Measured:
    """One warm-up, then rounds. `run_round` renders the graph once, with fresh seeds, and raises on failure.

    engines: a round renders on that many at once, and the score is their sum. limit_s bounds the measured rounds; at
    least one is always measured. Raises BenchmarkFailed with the cause.
    """
    if cached := cache.get(key):
        log.info("benchmark.cached", score=cached.score, median_s=cached.median_s)
        return Measured(score=cached, is_cached=True, flag="")
    known_median_s = cache.known_median_s(key)
    rounds_s: list[float] = []
    on_round("warm-up")
    await _timed(graph, run_round, engines, clock, "warm-up")
    began = clock.monotonic()
    while wants_another_round(rounds_s, elapsed_s=clock.monotonic() - began, limit_s=limit_s):
        on_round(f"round {len(rounds_s) + 1}")
        rounds_s.append(await _timed(graph, run_round, engines, clock, f"round {len(rounds_s) + 1}"))
    score = score_of(key, rounds_s, engines=engines, now=clock.now())
    flag = drift_flag(score.median_s, known_median_s)
    cache.put(score)
    log.info("benchmark.finished", score=round(score.score, 3), median_s=round(score.median_s, 3), flag=flag)
    return Measured(score=score, is_cached=False, flag=flag)


async def _timed(graph: Graph, run_round: RunRound, engines: int, clock: Clock, name: str) -> float:
    """Seconds until all engines have rendered it once."""
    began = clock.monotonic()
    failures: list[Exception] = []

    async def one() -> None:
        try:
            await run_round(graph)
        except Exception as error:  # whatever stops a round is this worker's reason for not being ready
            failures.append(error)

    async with anyio.create_task_group() as together:
        for _ in range(engines):
            together.start_soon(one)
    for error in failures:
        raise BenchmarkFailed(cause=f"{name} failed: {error}") from error
    seconds = clock.monotonic() - began
    log.info("benchmark.round", round=name, seconds=round(seconds, 3))
    return seconds

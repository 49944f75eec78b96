"""Several engines render a round side by side, and their scores add up."""

from __future__ import annotations

import anyio
import pytest

from comfyfleet.worker.agent.benchmark import BenchmarkFailed, BenchmarkKey, ScoreCache
from comfyfleet.worker.agent.measuring import measure

pytestmark = pytest.mark.anyio

KEY = BenchmarkKey(graph_digest="d", gpu_name="cpu", engine_version="1", template="local", engines=2)


async def test_two_engines_of_fifty_seconds_score_four(clock, tmp_path):
    running = 0
    most = 0

    async def run_round(_graph) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await clock.sleep(50)
        running -= 1

    found = []

    async def measuring() -> None:
        found.append(
            await measure(
                {}, KEY, run_round=run_round, engines=2, cache=ScoreCache(tmp_path / "s.json"), clock=clock, limit_s=600
            )
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(measuring)
        for _ in range(3):
            await clock.advance(50)

    assert most == 2
    assert found[0].score.score == pytest.approx(4.0)


async def test_one_engine_that_fails_fails_the_round(clock, tmp_path):
    calls = 0

    async def run_round(_graph) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")

    with pytest.raises(BenchmarkFailed, match="warm-up failed: out of memory"):
        await measure({}, KEY, run_round=run_round, engines=2, cache=ScoreCache(tmp_path / "s.json"), clock=clock)

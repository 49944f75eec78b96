"""Real jobs of the benchmark's shape say whether its score still holds; when not, the next start measures again."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyfleet.provision.template import find_template
from comfyfleet.wire.shapes import shape_of
from comfyfleet.worker.agent.benchmark import BenchmarkKey, ScoreCache, score_of
from comfyfleet.worker.agent.drift import ENOUGH_JOBS, KEPT_JOBS, DriftWatch, drift_of_jobs
from comfyfleet.worker.agent.measuring import measure

KEY = BenchmarkKey(graph_digest="g", gpu_name="cpu", engine_version="1", template="local")


@pytest.mark.parametrize(
    ("jobs_s", "is_doubted"),
    [
        ([13.0] * ENOUGH_JOBS, True),
        ([12.0] * ENOUGH_JOBS, False),  # 20 % is allowed
        ([99.0] * (ENOUGH_JOBS - 1), False),  # too few to say
        ([1.0] * 20, False),  # fast jobs may owe it to the engine's cache
        ([10.0, 10.0, 10.0, 90.0, 90.0], False),  # the median, not the worst
    ],
)
def test_more_than_a_fifth_slower_over_enough_jobs_is_drift(jobs_s: list[float], is_doubted: bool):
    assert bool(drift_of_jobs(jobs_s, 10.0)) is is_doubted


def test_the_reason_has_both_figures():
    assert drift_of_jobs([15.0] * 6, 10.0) == (
        "its last 6 jobs like the benchmark ran 50% slower than its median of 10.00 s"
    )


def test_only_jobs_of_the_benchmarks_shape_count_and_not_those_from_a_cache():
    watch = DriftWatch(shape="bench", median_s=10.0)
    for _ in range(20):
        watch.ran("another", 50.0)
        watch.ran("bench", None)
    assert watch.flag == ""

    for _ in range(ENOUGH_JOBS):
        watch.ran("bench", 50.0)
    assert watch.flag


def test_a_machine_that_recovers_is_trusted_again():
    watch = DriftWatch(shape="bench", median_s=10.0)
    for _ in range(ENOUGH_JOBS):
        watch.ran("bench", 50.0)
    for _ in range(KEPT_JOBS):
        watch.ran("bench", 10.0)

    assert watch.flag == ""


def test_a_callers_seed_and_words_leave_a_job_in_the_benchmarks_shape():
    graph = find_template("sd15").benchmark_graph()
    sampler = next(node for node in graph.values() if "seed" in node["inputs"])
    shape = shape_of(graph)

    sampler["inputs"]["seed"] = 4711
    next(node for node in graph.values() if "text" in node["inputs"])["inputs"]["text"] = "a lighthouse"
    assert shape_of(graph) == shape

    sampler["inputs"]["steps"] += 1
    assert shape_of(graph) != shape


@pytest.mark.anyio
async def test_a_score_that_jobs_denied_is_measured_again_and_flagged_against_what_was_known(clock, tmp_path: Path):
    cache = ScoreCache(tmp_path / "scores.json")
    cache.put(score_of(KEY, [10.0], now=clock.now()))
    assert cache.get(KEY) is not None

    cache.distrust(KEY)

    async def run_round(_graph) -> None:
        clock.jump(13.0)

    again = await measure({}, KEY, run_round=run_round, cache=ScoreCache(tmp_path / "scores.json"), clock=clock)
    assert not again.is_cached
    assert again.score.median_s == pytest.approx(13.0)
    assert "30% slower than this GPU's known median" in again.flag
    assert cache.get(KEY) == again.score

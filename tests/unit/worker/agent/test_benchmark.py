"""A score is 100 over the median of honest rounds, kept under what it holds for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.worker.agent.benchmark import (
    MAX_ROUNDS,
    BenchmarkFailed,
    BenchmarkKey,
    ScoreCache,
    drift_flag,
    graph_digest,
    score_of,
    wants_another_round,
)


def a_key(**changes: str) -> BenchmarkKey:
    values = {"graph_digest": "g", "gpu_name": "cpu", "engine_version": "1", "template": "local"}
    return BenchmarkKey(**{**values, **changes})


@pytest.mark.parametrize(("seconds", "score"), [(100.0, 1.0), (50.0, 2.0), (200.0, 0.5)])
def test_the_documents_own_examples(seconds: float, score: float) -> None:
    assert score_of(a_key(), [seconds], now=0.0).score == score


def test_one_lucky_round_does_not_make_the_score() -> None:
    assert score_of(a_key(), [0.5, 10.0, 10.0], now=0.0).median_s == 10.0


@pytest.mark.parametrize("rounds", [[], [0.0]])
def test_a_failed_benchmark_is_an_error_with_a_cause_and_never_a_score(rounds: list[float]) -> None:
    with pytest.raises(BenchmarkFailed) as failed:
        score_of(a_key(), rounds, now=0.0)
    assert str(failed.value)


def test_rounds_go_on_until_the_median_is_stable_or_time_is_up() -> None:
    assert wants_another_round([], elapsed_s=50.0, limit_s=10.0)
    assert wants_another_round([10.0], elapsed_s=10.0, limit_s=100.0)
    assert not wants_another_round([10.0, 10.1], elapsed_s=20.0, limit_s=100.0)
    assert wants_another_round([10.0, 14.0], elapsed_s=24.0, limit_s=100.0)
    assert not wants_another_round([10.0, 14.0], elapsed_s=24.0, limit_s=30.0)


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=30))
def test_a_benchmark_always_ends(rounds: list[float]) -> None:
    if len(rounds) >= MAX_ROUNDS:
        assert not wants_another_round(rounds, elapsed_s=sum(rounds), limit_s=1e9)


def test_a_cached_score_holds_only_for_the_same_graph_gpu_engine_and_template(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.json")
    cache.put(score_of(a_key(), [2.0], now=5.0))

    assert cache.get(a_key()).score == 50.0
    for change in ("graph_digest", "gpu_name", "engine_version", "template"):
        assert cache.get(a_key(**{change: "other"})) is None


def test_a_broken_cache_file_means_measuring_again(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("{half")

    assert ScoreCache(tmp_path / "scores.json").get(a_key()) is None


def test_more_than_a_fifth_from_the_same_gpus_median_is_flagged_with_the_figure() -> None:
    assert drift_flag(12.0, 10.0) == ""
    assert "30% slower" in drift_flag(13.0, 10.0)
    assert "30% faster" in drift_flag(7.0, 10.0)
    assert drift_flag(99.0, None) == ""


def test_the_digest_knows_the_graph_and_not_its_spelling() -> None:
    assert graph_digest({"a": 1, "b": 2}) == graph_digest({"b": 2, "a": 1})
    assert graph_digest({"a": 1}) != graph_digest({"a": 2})

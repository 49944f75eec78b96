"""A card that gets hot renders slower than its score says: real jobs show it, and the next start measures again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.one_worker import OneWorker

pytestmark = pytest.mark.slow

GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 3}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "hot"}},
}
# The fake engine, whose every second takes as many seconds as the file beside it says: with `--job-s 1`, a job does.
ENGINE = """
import pathlib
from comfyfleet.testing import fake_engine, fake_run
work = fake_run.FakeWorker._work
fake_run.FakeWorker._work = lambda self, s: work(self, s * float(pathlib.Path({heat!r}).read_text()))
fake_engine.main()
"""


def test_slow_jobs_flag_the_worker_and_outdate_its_cached_score(tmp_path: Path):
    heat, engine, graph = tmp_path / "heat", tmp_path / "engine.py", tmp_path / "benchmark.json"
    heat.write_text("0.4")
    engine.write_text(ENGINE.format(heat=str(heat)))
    graph.write_text(json.dumps(GRAPH))
    with OneWorker(
        tmp_path,
        COMFYFLEET_ENGINE_COMMAND=f"{sys.executable} {engine} --job-s 1",
        BENCHMARK_JSON_PATH=str(graph),
        COMFYFLEET_BENCHMARK_LIMIT_S="60",  # of the template's few seconds, one round that stalls would be all there is
    ) as fleet:
        cool = fleet.row_when(lambda row: row["status"] == "idle")
        assert cool["flag"] == ""
        scores = next((tmp_path / "control" / "workers").glob("*/scores.json"))
        assert [score["is_stale"] for score in json.loads(scores.read_text())] == [False]

        # A round holds the worker's own work as well, much of it on a slow machine: what is slower than all of that
        # is the card.
        heat.write_text(str(1.5 * 100.0 / cool["measured_perf"]))
        for number in range(6):
            body = {"endpoint": "comfy", "input": {"workflow_json": with_color(number)}}
            status, answer = fleet.plane.call("POST", "/v1/jobs", body)
            assert status == 202, answer
        hot = fleet.row_when(lambda row: row["flag"])

        assert "jobs like the benchmark ran" in hot["flag"]
        assert hot["status"] == "idle"  # doubted, and still of use
        assert [score["is_stale"] for score in json.loads(scores.read_text())] == [True]


def with_color(color: int) -> dict:
    """Another picture that costs the same."""
    return {**GRAPH, "1": {**GRAPH["1"], "inputs": {**GRAPH["1"]["inputs"], "color": color}}}

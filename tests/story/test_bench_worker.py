"""`comfyfleet bench-worker` against a running wrapper: rounds, a score, and a cause when it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from comfyfleet.testing.processes import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """A standalone worker over a fake engine whose jobs take 50 ms; its base URL."""
    folder = tmp_path_factory.mktemp("wrapper")
    port, engine = free_port(), free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "comfyfleet", "worker", "--standalone", "--port", str(port)),
            *("--engine-port", str(engine), "--data-dir", str(folder)),
        ],
        env={
            **os.environ,
            "COMFYFLEET_ENGINE_COMMAND": f"{sys.executable} -m comfyfleet.testing.fake_engine --job-s 0.05",
        },
        stderr=subprocess.DEVNULL,
    )
    base, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{base}/health", timeout=60) as answer:
                    health = json.loads(answer.read())
                    break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        assert "never one of a running or unread job" in health["cleanup"]["rule"]
        yield base
    finally:
        process.terminate()
        process.wait(90)


def bench(base: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "comfyfleet", "bench-worker", "--url", base, *words],
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_it_prints_its_rounds_and_a_score_and_remembers_it(wrapper: str, tmp_path: Path):
    graph = tmp_path / "g.json"
    picture = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "b"}}
    graph.write_text(json.dumps({"1": picture, "2": save}))
    words = ("--graph", str(graph), "--cache", str(tmp_path / "scores.json"))

    first, second = bench(wrapper, *words), bench(wrapper, *words)

    assert first.returncode == 0, first.stderr
    score, median = map(float, re.search(r"score ([\d.]+) \(median ([\d.]+) s", first.stdout).groups())
    assert score == pytest.approx(100 / median, rel=0.05)
    assert "warm-up" in first.stdout
    assert "cached" in second.stdout


def test_a_graph_that_fails_is_an_error_with_its_cause(wrapper: str, tmp_path: Path):
    graph = tmp_path / "g.json"
    graph.write_text(json.dumps({"1": {"class_type": "NoSuchNode", "inputs": {}}}))

    done = bench(wrapper, "--graph", str(graph))

    assert done.returncode == 1
    assert "NoSuchNode" in done.stderr

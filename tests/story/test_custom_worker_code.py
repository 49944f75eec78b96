"""PYWORKER_REPO: code written for the public worker framework serves in place of our agent, from a git repository."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.control_plane import ControlPlane
from support.vastai import vastai_python

pytestmark = pytest.mark.slow

WORKER = """
import json, os
from vastai import BenchmarkConfig, HandlerConfig, LogActionConfig, Worker, WorkerConfig

graph = json.load(open("workers/comfyui-json/misc/benchmark.json"))
Worker(WorkerConfig(
    model_server_url="http://127.0.0.1",
    model_server_port=int(os.environ["COMFYFLEET_WRAPPER_PORT"]),
    model_log_file=os.environ["MODEL_LOG"],
    model_healthcheck_url="/health",
    handlers=[HandlerConfig(
        route="/generate/sync",
        allow_parallel_requests=False,
        max_queue_time=60.0,
        benchmark_config=BenchmarkConfig(dataset=[{"input": {"workflow_json": graph}}], runs=1, concurrency=1),
    )],
    log_action_config=LogActionConfig(on_load=["BACKENDS_READY"], on_error=["BACKEND_UNRECOVERABLE"]),
)).run(host="127.0.0.1")
"""


def a_repository(folder: Path) -> Path:
    """Two commits: the first has no worker.py, the branch `release` has one."""
    (folder / "workers" / "comfyui-json").mkdir(parents=True)
    (folder / "workers" / "comfyui-json" / "README").write_text("a worker")

    def git(*words: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-qm", "empty")
    git("checkout", "-qb", "release")
    (folder / "worker.py").write_text(WORKER)
    git("add", "-A")
    git("commit", "-qm", "worker")
    git("checkout", "-q", "main")
    return folder


def a_fleet(folder: Path, **environment: str) -> ControlPlane:
    plane = ControlPlane(
        folder / "control",
        arguments=["--fleet", "local", "--max-workers", "1"],
        environment={
            "COMFYFLEET_ENGINE_COMMAND": f"{sys.executable} -m comfyfleet.testing.fake_engine",
            "COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1",
            **environment,
        },
    )
    plane.start()
    endpoint = {"endpoint_name": "comfy", "cold_workers": 1, "max_workers": 1, "min_load": 1e9}
    assert plane.call("POST", "/api/v0/endptjobs/", endpoint)[0] == 200
    group = {"endpoint_name": "comfy", "template_hash": "local"}
    assert plane.call("POST", "/api/v0/workergroups/", group)[0] == 200
    return plane


def row_when(plane: ControlPlane, wanted, limit_s: float = 120.0) -> dict:
    until = time.monotonic() + limit_s
    rows: list[dict] = []
    while time.monotonic() < until:
        rows = plane.call("GET", "/v1/workers")[1]["workers"]
        for row in rows:
            if wanted(row):
                return row
        time.sleep(0.2)
    logs = "".join(path.read_text()[-2000:] for path in plane.folder.glob("workers/*/logs/pyworker.log"))
    raise AssertionError(f"{rows}\n{logs}\n{plane.log[-1500:]}")


def test_a_workers_own_code_runs_at_its_ref_with_the_templates_benchmark(tmp_path: Path):
    repository = a_repository(tmp_path / "repository")
    plane = a_fleet(
        tmp_path,
        PYWORKER_REPO=repository.as_uri(),
        PYWORKER_REF="release",
        COMFYFLEET_PYWORKER_PYTHON=str(vastai_python()),
    )
    try:
        row = row_when(plane, lambda row: row["status"] == "idle")
        clone = next((tmp_path / "control" / "workers").glob("*/pyworker"))
        version = plane.call("GET", f"/v1/workers/{row['id']}")[1]

        assert row["measured_perf"] > 0
        assert json.loads((clone / "workers" / "comfyui-json" / "misc" / "benchmark.json").read_text())
        assert "comfyfleet" not in json.dumps(version.get("version", ""))
    finally:
        plane.close()


def test_a_ref_without_worker_code_is_the_workers_own_reason(tmp_path: Path):
    repository = a_repository(tmp_path / "repository")
    plane = a_fleet(
        tmp_path,
        PYWORKER_REPO=repository.as_uri(),
        PYWORKER_REF="main",
        COMFYFLEET_PYWORKER_PYTHON=sys.executable,
    )
    try:
        row = row_when(plane, lambda row: row["error_msg"])

        assert "has neither worker.py nor workers/comfyui-json/worker.py" in row["error_msg"]
    finally:
        plane.close()

"""A disk below the asked minimum: old outputs go; while it stays full, jobs get 507 and the worker is not Ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from comfyfleet.cli.clean import command
from comfyfleet.testing.processes import free_port

DAY_S = 86_400


def an_output(data_dir: Path, name: str, *, age_s: float) -> Path:
    path = data_dir / "output" / name / "song.mp3"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 100)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_clean_by_hand_removes_old_outputs_only_when_room_is_needed(tmp_path: Path):
    old, young = an_output(tmp_path, "old", age_s=2 * DAY_S), an_output(tmp_path, "young", age_s=60)

    calm = CliRunner().invoke(command, ["--data-dir", str(tmp_path), "--min-free", "1"])
    assert calm.exit_code == 0
    assert old.exists()

    shown = CliRunner().invoke(command, ["--data-dir", str(tmp_path), "--min-free", str(10**18), "--dry-run"])
    assert "old: output/old/song.mp3" in shown.output
    assert old.exists()

    done = CliRunner().invoke(command, ["--data-dir", str(tmp_path), "--min-free", str(10**18)])
    assert "removed output/old/song.mp3" in done.output
    assert "still full" in done.output
    assert done.exit_code == 1
    assert not old.exists()
    assert young.exists()


def call(method: str, url: str, body: object = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, method=method, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.slow
def test_a_worker_whose_disk_is_full_refuses_jobs_with_507_and_is_not_ready(tmp_path: Path):
    old = an_output(tmp_path, "old", age_s=2 * DAY_S)
    port, engine = free_port(), free_port()
    base = f"http://127.0.0.1:{port}"
    log = tmp_path / "worker.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "comfyfleet", "worker", "--standalone", "--port", str(port)),
                *("--engine-port", str(engine), "--data-dir", str(tmp_path)),
            ],
            env={
                **os.environ,
                "COMFYFLEET_ENGINE_COMMAND": f"{sys.executable} -m comfyfleet.testing.fake_engine",
                "COMFYFLEET_MIN_FREE_BYTES": str(10**18),
            },
            stderr=said,
        )
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            try:
                status, health = call("GET", f"{base}/health")
            except OSError:
                health, status = {}, 0
            if health.get("backends_healthy") == "1/1":
                break
            time.sleep(0.1)
        graph = {"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}}}
        graph["2"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "b"}}
        refused, body = call("POST", f"{base}/generate/sync", {"input": {"workflow_json": graph}})

        assert status == 503
        assert "the disk is full" in health["reason"]
        assert health["cleanup"]["is_full"]
        assert refused == 507
        assert body["error"]["code"] == "disk_full"
        assert body["error"]["details"]["needed_bytes"] == 10**18
        assert not old.exists()
    finally:
        process.terminate()
        process.wait(90)

"""Whatever keeps a worker from being Ready stands in the control plane's worker list, in its own words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from comfyfleet.provision.template import find_template
from support.model_server import Hosted, a_safetensors_file, model_server
from support.one_worker import OneWorker

pytestmark = pytest.mark.slow


def test_a_broken_benchmark_graph(tmp_path: Path):
    graph = tmp_path / "benchmark.json"
    graph.write_text(json.dumps({"1": {"class_type": "NoSuchNode", "inputs": {}}}))

    with OneWorker(tmp_path, BENCHMARK_JSON_PATH=str(graph)) as fleet:
        row = fleet.row_when(lambda row: row["error_msg"])

    assert row["status"] == "error"
    assert row["error_msg"].startswith("benchmark: ")
    assert "NoSuchNode" in row["error_msg"]


def test_a_missing_model(tmp_path: Path):
    with model_server() as server, OneWorker(tmp_path, "sd15", HF_ENDPOINT=server.base) as fleet:
        row = fleet.row_when(lambda row: row["error_msg"])

    assert row["status"] == "error"
    assert row["error_msg"].startswith("provisioning: v1-5-pruned-emaonly-fp16.safetensors: ")
    assert row["error_msg"].endswith("answered 404")


def test_an_engine_that_ends_at_start(tmp_path: Path):
    script = tmp_path / "engine.py"
    script.write_text("import sys; print('no CUDA driver', file=sys.stderr); sys.exit(3)")

    with OneWorker(tmp_path, COMFYFLEET_ENGINE_COMMAND=f"{sys.executable} {script}") as fleet:
        row = fleet.row_when(lambda row: row["error_msg"])

    assert row["status"] == "error"
    assert "engine-0 does not start: the engine ended with code 3: no CUDA driver" in row["error_msg"]


def test_a_full_disk(tmp_path: Path):
    with OneWorker(tmp_path, COMFYFLEET_MIN_FREE_BYTES=str(10**18)) as fleet:
        row = fleet.row_when(lambda row: row["error_msg"])

    assert row["status"] == "error"
    assert "the disk is full" in row["error_msg"]
    assert "1000000.00 TB needed" in row["error_msg"]


def test_a_provisioning_script_that_fails_is_never_ready(tmp_path: Path):
    script = tmp_path / "provision.sh"
    script.write_text('echo fetching with $HF_TOKEN\necho "no such bucket for $HF_TOKEN" >&2\nexit 7\n')

    with OneWorker(tmp_path, PROVISIONING_SCRIPT=str(script), HF_TOKEN="hf_swordfish") as fleet:
        row = fleet.row_when(lambda row: row["error_msg"])
        log = fleet.model_log_with("[ERROR]")

    assert row["status"] == "error"
    assert row["error_msg"] == "provisioning: the provisioning script ended with code 7: no such bucket for ***"
    assert "[ERROR] Provisioning Script failed with exit code 7" in log
    assert "BACKENDS_READY" not in log
    assert "fetching with ***\n" in log


def test_a_provisioning_script_by_url_runs_before_the_engine_does(tmp_path: Path):
    content = b"echo from afar\nprintf fetched > marker\n"
    with model_server() as server:
        url = server.add("/provision.sh", Hosted(content, content_type="text/x-shellscript"))
        with OneWorker(tmp_path, PROVISIONING_SCRIPT=url) as fleet:
            row = fleet.row_when(lambda row: row["status"] in ("idle", "error"))
            log = fleet.model_log_with("BACKENDS_READY")
            marker = next((tmp_path / "control" / "workers").glob("*/marker")).read_text()

    assert row["error_msg"] == ""
    assert marker == "fetched"
    assert log.index("from afar") < log.index("BACKENDS_READY")


def test_a_provisioning_script_at_a_private_address_is_refused_and_the_worker_never_ready(tmp_path: Path):
    with model_server() as server:
        url = server.add("/provision.sh", Hosted(b"touch marker\n"))
        with OneWorker(tmp_path, PROVISIONING_SCRIPT=url, COMFYFLEET_ALLOWED_PRIVATE_HOSTS="") as fleet:
            row = fleet.row_when(lambda row: row["error_msg"])

        assert row["status"] == "error"
        assert row["error_msg"].startswith("provisioning: PROVISIONING_SCRIPT: ")
        assert "127.0.0.1" in row["error_msg"]
        assert server.log == []  # not even asked
        assert not list((tmp_path / "control" / "workers").glob("*/marker"))


def test_a_provisioning_script_that_its_server_does_not_have_is_named(tmp_path: Path):
    with model_server() as server, OneWorker(tmp_path, PROVISIONING_SCRIPT=f"{server.base}/none.sh") as fleet:
        row = fleet.row_when(lambda row: row["error_msg"])

    assert row["status"] == "error"
    assert row["error_msg"].startswith("provisioning: PROVISIONING_SCRIPT: ")
    assert "404" in row["error_msg"]


def test_a_worker_shows_how_far_its_downloads_are_and_then_serves(tmp_path: Path):
    content = a_safetensors_file(3_000_000)
    own = tmp_path / "own.toml"
    (tmp_path / "graph.json").write_text(json.dumps(find_template("sd15").benchmark_graph()))
    own.write_text(
        'benchmark = "graph.json"\n[[models]]\nurl = "hf://o/r/own.safetensors"\nfolder = "checkpoints"\n'
        f'sha256 = "{Hosted(content).sha256}"\n'
    )
    with model_server() as server:
        server.add("/o/r/resolve/main/own.safetensors", Hosted(content, bytes_per_s=600_000))
        with OneWorker(tmp_path, str(own), HF_ENDPOINT=server.base) as fleet:
            loading = fleet.row_when(lambda row: "%" in row["stage_detail"])
            ready = fleet.row_when(lambda row: row["status"] == "idle")
            logs = fleet.model_log_with("BACKENDS_READY")

        assert (loading["status"], loading["stage"]) == ("loading", "provisioning")
        assert loading["stage_detail"].startswith("downloading 1 of 1, ")
        assert (tmp_path / "control" / "models" / "checkpoints" / "own.safetensors").read_bytes() == content
        assert ready["error_msg"] == ""
        assert logs.splitlines()[-1] == "BACKENDS_READY"

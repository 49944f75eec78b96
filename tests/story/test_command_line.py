"""The command line against a running control plane: what a user types, and what he reads."""

from __future__ import annotations

import json
import re
import stat
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from comfyfleet.cli.main import command
from comfyfleet.wire.errors import FleetError
from support.control_plane import ControlPlane

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    plane = ControlPlane(tmp_path_factory.mktemp("control")).start()
    yield plane
    plane.close()


@pytest.fixture
def comfyfleet(plane):
    """Run a command in this process, as `main` does: a refusal is one line on stderr and exit code 1."""

    def run(*arguments: str, key: str | None = None, stdin: str = "") -> SimpleNamespace:
        env = {"COMFYFLEET_URL": plane.base, "COMFYFLEET_API_KEY": key or plane.key, "HOME": str(plane.folder)}
        result = CliRunner().invoke(command, arguments, env=env, input=stdin)
        if isinstance(result.exception, FleetError):
            return SimpleNamespace(returncode=1, stdout=result.stdout, stderr=result.exception.message)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return SimpleNamespace(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)

    return run


def test_endpoints_and_workergroups_are_made_changed_and_deleted(comfyfleet):
    assert "created" in comfyfleet("endpoint", "create", "my songs", "--cold-workers", "0").stdout
    assert comfyfleet("workergroup", "create", "my songs", "--search-params", "gpu_ram>=24").returncode == 0
    assert comfyfleet("endpoint", "update", "my songs", "--max-workers", "3", "--state", "suspended").returncode == 0

    (row,) = json.loads(comfyfleet("endpoint", "list", "--raw").stdout)
    assert (row["endpoint_name"], row["max_workers"], row["endpoint_state"]) == ("my songs", 3, "suspended")
    (group,) = json.loads(comfyfleet("workergroup", "list", "--raw").stdout)
    assert group["search_query"] == {"gpu_ram": {"gte": 24}}
    assert "max_workers: 20 -> 3" in comfyfleet("endpoint", "logs", "my songs").stdout
    refused = comfyfleet("endpoint", "update", "my songs", "--target-util", "7")
    assert refused.returncode == 1
    assert "target_util must be from 0.01 to 1" in refused.stderr

    assert "deleted" in comfyfleet("endpoint", "delete", "my songs").stdout
    assert json.loads(comfyfleet("endpoint", "list", "--raw").stdout) == []


def test_without_a_fleet_there_are_no_machines_to_show(comfyfleet):
    for what in ("nodes", "workers", "events"):
        answer = json.loads(comfyfleet("fleet", what, "--raw").stdout)
        assert answer[what] == []
    assert comfyfleet("fleet", "events", "--limit", "0").returncode == 2


def test_a_key_is_shown_once_works_within_its_scope_and_can_be_revoked(comfyfleet):
    made = comfyfleet("key", "create", "reader", "--scope", "read", "--expires-in-days", "1").stdout
    key_id, key = re.fullmatch(r"key (\d+): (cfk_\S+)\n", made).groups()

    assert key not in comfyfleet("key", "list", "--raw").stdout
    assert comfyfleet("endpoint", "list", key=key).returncode == 0
    refused = comfyfleet("endpoint", "create", "x", key=key)
    assert (refused.returncode, "scope 'manage'" in refused.stderr) == (1, True)
    comfyfleet("key", "revoke", key_id)
    assert comfyfleet("endpoint", "list", key=key).returncode == 1


def test_account_variables_are_kept_encrypted_and_secret_ones_are_never_shown(plane, comfyfleet):
    assert comfyfleet("env", "set", "HF_TOKEN=hf_swordfish", "S3_REGION=eu", "--plain").returncode == 0
    assert comfyfleet("env", "set", "S3_SECRET_ACCESS_KEY", stdin="swordfish-by-stdin\n").returncode == 0
    comfyfleet("env", "set", "HF_TOKEN=hf_swordfish")

    shown = comfyfleet("env", "list").stdout
    assert re.search(r"S3_REGION\s+eu", shown)
    assert re.search(r"HF_TOKEN\s+\*\*\*", shown)
    assert "swordfish" not in shown
    for path in plane.folder.glob("control.sqlite3*"):
        assert b"swordfish" not in path.read_bytes()
    assert "swordfish" not in plane.log
    assert comfyfleet("env", "set", "MASTER_TOKEN=x").returncode == 1
    assert comfyfleet("env", "unset", "S3_REGION").returncode == 0
    assert "S3_REGION" not in comfyfleet("env", "list").stdout


def test_a_job_is_submitted_listed_and_cancelled(comfyfleet, tmp_path):
    comfyfleet("endpoint", "create", "empty", "--cold-workers", "0")
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"1": {"class_type": "EmptyImage", "inputs": {}}}))

    job_id = comfyfleet("jobs", "submit", str(graph), "--endpoint", "empty", "--idempotency-key", "k").stdout.strip()
    again = comfyfleet("jobs", "submit", str(graph), "--endpoint", "empty", "--idempotency-key", "k").stdout.strip()

    assert job_id == again
    assert job_id in comfyfleet("jobs", "list").stdout
    assert json.loads(comfyfleet("jobs", "show", job_id).stdout)["waiting"]["reason"]
    assert comfyfleet("jobs", "cancel", job_id).stdout.strip() == "cancelled"
    assert comfyfleet("jobs", "wait", job_id).returncode == 1


def test_secrets_on_disk_are_readable_by_their_owner_only_and_never_logged(plane):
    for name in ("admin.key", "master.key", "files.key", "ca.key", "control.sqlite3", "ticket_ed25519.pem"):
        assert stat.S_IMODE((plane.folder / name).stat().st_mode) == 0o600, name
    plane.call("GET", f"/api/v0/endptjobs/?api_key={plane.key}", key="")
    assert plane.key not in plane.log


def test_the_api_has_a_page_that_documents_it(plane):
    status, document = plane.call("GET", "/openapi.json", key="")

    assert status == 200
    assert plane.call("GET", "/docs", key="")[0] == 200
    for path in ("/api/v0/endptjobs/", "/api/v0/workergroups/", "/v1/jobs", "/v1/jobs/{job_id}/events", "/v1/keys"):
        assert path in document["paths"]
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"endpoint", "input", "priority", "deadline_s"} <= body["properties"].keys()


@pytest.mark.parametrize(
    "path", ["/v1/jobs", "/v1/keys", "/v1/env", "/v1/usage", "/v1/workers", "/metrics", "/api/v0/template/"]
)
def test_everything_but_health_docs_and_public_keys_needs_a_key(plane, path):
    status, body = plane.call("GET", path, key="")

    assert (status, body["error"]) == (401, "unauthorized")


def test_a_certificate_is_signed_for_who_may_ask_for_one(plane):
    assert plane.call("POST", "/api/v0/sign_cert/?instance_id=42", {"x": 1}, key="")[0] == 401
    assert plane.call("POST", "/api/v0/sign_cert/?instance_id=42", {"x": 1}, key="guess")[0] == 401
    status, body = plane.call("POST", "/api/v0/sign_cert/?address=10.0.0.7", {"x": 1})
    assert (status, body["error"]) == (400, "bad_request")

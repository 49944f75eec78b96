"""Statements 57 and 60: an endpoint made, benchmarked and deleted by the real client, with work still under way."""

from __future__ import annotations

import time

import pytest

from support.fleet_world import FleetWorld
from support.vastai import run_vastai

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = FleetWorld(tmp_path_factory.mktemp("fleet"))
    try:
        world.plane.start()
        yield world
    finally:
        world.close()


def test_checklist_57_the_benchmark_commands_logic_sees_idle_only_with_a_score(world):
    states = run_vastai(
        """
        vast = VastAI(KEY, server_url=BASE)
        made = vast.create_endpoint(endpoint_name="comfy", cold_workers=1, max_workers=1, min_load=1.0)
        vast.create_workergroup(endpoint_id=made["result"], template_hash="local", no_default=True)
        RESULT, until = [], time.monotonic() + 120
        while time.monotonic() < until:
            for row in vast.get_endpoint_workers(made["result"]):
                if [row["status"], row["measured_perf"] > 0] not in RESULT:
                    RESULT.append([row["status"], row["measured_perf"] > 0])
            if ["idle", True] in RESULT:
                break
            time.sleep(0.1)
    """,
        base=world.plane.base,
        key=world.plane.key,
        timeout_s=180,
    )

    assert states[-1] == ["idle", True]
    assert ["idle", False] not in states
    assert {status for status, _ in states} <= {"creating", "loading", "model_loading", "idle"}


def test_checklist_60_work_under_way_gets_its_result_before_the_deleted_endpoints_worker_stops(world):
    running = world.submit(1, gate="sixty")
    world.until(running, "running")
    waiting = [world.submit(n, cost=1e9) for n in (2, 3)]
    endpoint_id = world.plane.call("GET", "/api/v0/endptjobs/")[1]["results"][0]["id"]

    answer = run_vastai(
        "RESULT = VastAI(KEY, server_url=BASE).delete_endpoint(ID)",
        base=world.plane.base,
        key=world.plane.key,
        ID=endpoint_id,
    )

    world.open_gate("sixty")

    assert (answer["success"], len(answer["deleted_workers"]), answer["failed_workers"]) == (True, 1, [])
    assert world.until(running)["status"] == "completed"
    for job_id in waiting:
        job = world.until(job_id)
        assert job["status"] == "completed" or job["error"]["code"] == "endpoint_deleted"
    until = time.monotonic() + 90
    while list((world.plane.folder / "workers").glob("*")) and time.monotonic() < until:
        time.sleep(0.1)
    assert list((world.plane.folder / "workers").glob("*")) == []
    assert world.plane.call("GET", "/api/v0/autojobs/")[1]["results"] == []
    assert world.plane.call("POST", "/get_endpoint_workers/", {"id": endpoint_id}) == (
        200,
        {"error_msg": "no such endpoint"},
    )
    assert world.plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": "comfy", "cold_workers": 0})[0] == 200

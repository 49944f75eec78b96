"""Statements 11, 57 and 60: an endpoint from nothing to its first answer, benchmarked, deleted with work under way."""

from __future__ import annotations

import time

import pytest

from support.fleet_world import FleetWorld, a_graph
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


def test_checklist_11_a_request_sent_while_nothing_exists_starts_a_worker_and_ends_well(world):
    plane = world.plane
    body = {"endpoint_name": "from zero", "cold_workers": 0, "min_load": 0, "max_workers": 1}
    _, made = plane.call("POST", "/api/v0/endptjobs/", body)
    plane.call("POST", "/api/v0/workergroups/", {"endpoint_id": made["result"], "template_hash": "local"})
    assert world.worker_rows() == []

    answer = run_vastai(
        """
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            endpoint = await client.get_endpoint("from zero")
            RESULT = await endpoint.request("/generate/sync", PAYLOAD)
        """,
        base=plane.base,
        key=plane.key,
        PAYLOAD={"input": {"workflow_json": a_graph(11)}},
    )

    assert (answer["ok"], answer["response"]["status"]) == (True, "completed")
    assert plane.call("DELETE", f"/api/v0/endptjobs/{made['result']}/")[0] == 200
    until_no_worker_is_left(world)


def until_no_worker_is_left(world) -> None:
    until = time.monotonic() + 120
    while list((world.plane.folder / "workers").glob("[0-9]*")):
        assert time.monotonic() < until, world.plane.log[-3000:]
        time.sleep(0.1)


def test_checklist_57_the_benchmark_command_searches_asks_measures_and_tidies_up(world):
    _, listing = world.plane.call("GET", "/api/v0/template/")
    template = next(row["hash_id"] for row in listing["templates"] if row["name"] == "local")

    rows, seen, skipped = run_vastai(
        """
        import argparse, contextlib, io
        from vastai.cli.commands import benchmarks
        benchmarks.WORKER_POLL_INTERVAL = 0.1
        seen, asked = [], VastAI.get_endpoint_workers

        def noted(self, endpoint_id):
            found = asked(self, endpoint_id)
            for row in found if isinstance(found, list) else []:
                state = [row["status"], row["measured_perf"] > 0]
                if state not in seen:
                    seen.append(state)
            return found

        VastAI.get_endpoint_workers = noted
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            rows = await asyncio.to_thread(benchmarks.run__benchmarks, argparse.Namespace(
                template_hash=TEMPLATE, template_id=None, gpus="64x RTX_4090, RTX_4090", num_gpus=None, timeout=150,
                no_cache=False, yes=True, raw=True, auto_instance=None, autoscaler_url=None,
                api_key=KEY, url=BASE, retry=3,
            ))
        RESULT = rows, seen, told.getvalue()
    """,
        base=world.plane.base,
        key=world.plane.key,
        TEMPLATE=template,
    )

    assert {row["num_gpus"]: row["status"] for row in rows} == {1: "ok", 64: "skipped"}, (rows, seen, skipped)
    assert max(row["measured_perf"] or 0 for row in rows) > 0
    assert "no offers for RTX 4090 (num_gpus=64)" in skipped
    assert "failed to fetch" not in skipped, "the price of a worker is known"
    assert ["idle", True] in seen
    assert ["idle", False] not in seen
    until_no_worker_is_left(world)
    assert world.plane.call("GET", "/api/v0/endptjobs/")[1]["results"] == [], "its endpoint is deleted"


def test_checklist_60_work_under_way_gets_its_result_before_the_deleted_endpoints_worker_stops(world):
    world.start()
    running = world.submit(1, gate="sixty")
    world.until(running, "running")
    waiting = [world.submit(n, cost=1e9) for n in (2, 3)]
    (endpoint_id,) = [row["id"] for row in world.plane.call("GET", "/api/v0/endptjobs/")[1]["results"]]

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
    until_no_worker_is_left(world)
    assert world.plane.call("GET", "/api/v0/autojobs/")[1]["results"] == []
    assert world.plane.call("POST", "/get_endpoint_workers/", {"id": endpoint_id}) == (
        200,
        {"error_msg": "no such endpoint"},
    )
    assert world.plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": "comfy", "cold_workers": 0})[0] == 200

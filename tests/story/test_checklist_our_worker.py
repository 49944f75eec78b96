"""Statements 25, 35 to 39, 41 to 44, 62 and 63: the real client against our control plane and our worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from comfyfleet.testing.processes import free_port
from support.fleet_world import FleetWorld, a_graph, asked
from support.http_calls import post_json
from support.yardstick import Yardstick

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetWorld]:
    world = FleetWorld(tmp_path_factory.mktemp("fleet"))
    try:
        yield world.start()
    finally:
        world.close()


def payload(graph: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"input": {"workflow_json": graph, **fields}}


def renders(world: FleetWorld) -> int:
    """Renders that any engine of this world ever began."""
    lines = world.ledger.read_text().splitlines() if world.ledger.exists() else []
    return sum(line.startswith("start") and "canary" not in line for line in lines)


def worker_pids(world: FleetWorld) -> dict[str, int]:
    """Worker id -> the pid of its process."""
    paths = (world.plane.folder / "workers").glob("*/local.json")
    return {path.parent.name: json.loads(path.read_text())["pid"] for path in paths}


def test_checklist_25_our_worker_refuses_a_ticket_that_is_not_for_this_request(world: FleetWorld) -> None:
    routed = asked(world, 'RESULT = await endpoint.request("/generate/sync", PAYLOAD)', PAYLOAD=payload(a_graph(1)))
    auth = routed["auth_data"]

    def refusal(**changes: Any) -> tuple[int, str]:
        call = {"auth_data": {**auth, **changes}, "payload": payload(a_graph(2)), "session_id": None}
        status, body = post_json(f"{routed['url']}/generate/sync", call)
        return status, body["error"]["details"]["reason"]

    assert refusal() == (401, "replayed")
    assert refusal(endpoint="another") == (401, "changed_endpoint")
    assert refusal(url="http://127.0.0.1:1") == (401, "changed_url")
    assert refusal(cost=1) == (401, "changed_cost")
    assert refusal(reqnum=auth["reqnum"] + 1) == (401, "changed_reqnum")

    for rest in ({}, {"payload": [1]}, {"payload": None}):  # nothing is told of the rest to who holds no ticket
        status, _ = post_json(f"{routed['url']}/generate/sync", {"auth_data": {**auth, "cost": 1}, **rest})
        assert status == 401


def test_checklist_35_a_result_has_every_field_of_the_known_client(world: FleetWorld) -> None:
    result = asked(world, 'RESULT = await endpoint.request("/generate/sync", PAYLOAD)', PAYLOAD=payload(a_graph(10)))

    assert (result["ok"], result["status"]) == (True, 200)
    assert result["response"]["status"] == "completed"
    assert result["response"]["output"][0]["filename"].endswith(".png")
    assert result["latency"] > 0
    assert result["url"].startswith("http://127.0.0.1:")
    assert result["request_idx"] == result["auth_data"]["request_idx"] > 0


def test_checklist_36_media_comes_as_bytes_and_text_as_text(world: FleetWorld) -> None:
    made = asked(
        world,
        'RESULT = await endpoint.request("/generate/sync", PAYLOAD)',
        PAYLOAD=payload(a_graph(11), request_id="media"),
    )
    folder = Path(made["response"]["output"][0]["local_path"]).parent
    (folder / "notes.txt").write_text("a line")

    picture, text = asked(
        world,
        """
        answers = [await endpoint.request(f"/files/media/{name}", {}) for name in NAMES]
        RESULT = [[type(a["response"]).__name__, len(a["response"]), a["content_type"]] for a in answers]
        """,
        NAMES=[made["response"]["output"][0]["filename"], "notes.txt"],
    )

    assert picture[0] == "bytes"
    assert picture[1] == (folder / made["response"]["output"][0]["filename"]).stat().st_size
    assert picture[2].startswith("image/png")
    assert text[:2] == ["str", 6]


def test_checklist_37_every_event_of_a_stream_arrives_the_last_included(world: FleetWorld) -> None:
    events = asked(
        world,
        """
        answer = await endpoint.request("/generate/stream", PAYLOAD, stream=True)
        RESULT = [event async for event in answer["response"]]
        """,
        PAYLOAD=payload(a_graph(12, sleep_s=0.3)),
    )

    assert events[-1]["status"] == "final_result"
    assert events[-1]["result"]["status"] == "completed"
    assert len(events) >= 3


def test_checklist_38_a_refused_workflow_is_one_4xx_and_no_execution(world: FleetWorld) -> None:
    before = renders(world)
    broken = a_graph(13)
    broken["2"]["inputs"]["images"] = ["9", 0]

    result = asked(world, 'RESULT = await endpoint.request("/generate/sync", PAYLOAD)', PAYLOAD=payload(broken))

    assert (result["ok"], result["status"]) == (False, 422)
    assert result["response"]["error"]["details"]["node_id"] == "2"
    assert renders(world) == before


def test_checklist_41_cancelling_frees_the_worker_within_two_seconds(world: FleetWorld) -> None:
    freed_s, result = asked(
        world,
        """
        def renders():
            return sum(line.startswith("start") and "canary" not in line for line in open(LEDGER))
        task = asyncio.ensure_future(endpoint.request("/generate/sync", PAYLOAD))
        while renders() == BEFORE:
            await asyncio.sleep(0.05)
        task.cancel()
        cancelled_at = time.monotonic()
        while any(w.reqs_working for w in await endpoint.get_workers()):
            await asyncio.sleep(0.05)
        RESULT = [time.monotonic() - cancelled_at, await endpoint.request("/generate/sync", NEXT)]
        """,
        PAYLOAD=payload(a_graph(14, gate="never")),
        NEXT=payload(a_graph(15)),
        LEDGER=str(world.ledger),
        BEFORE=renders(world),
    )

    assert result["ok"]  # the engine was stopped: the first one would hold it for ever
    # The worker needs less than two seconds. A listing is as old as the worker's last report, and a request that came
    # and went between two reports stays booked for ten.
    assert freed_s < 10.0 + 20.0


def test_checklist_42_a_timeout_ends_the_wait_for_a_worker_that_never_comes(world: FleetWorld) -> None:
    body = {"endpoint_name": "empty", "cold_workers": 0, "max_workers": 0, "min_load": 0}
    assert world.plane.call("POST", "/api/v0/endptjobs/", body)[0] == 200

    kind, seconds = asked(
        world,
        """
        empty = await client.get_endpoint(name="empty")
        began = time.monotonic()
        try:
            await empty.request("/generate/sync", {}, timeout=2)
            RESULT = ["none", 0]
        except Exception as error:
            RESULT = [type(error).__name__, time.monotonic() - began]
        """,
    )

    assert kind == "TimeoutError"
    assert seconds < 8


def test_checklist_43_a_job_that_outlasts_its_call_is_joined_and_rendered_once(world: FleetWorld) -> None:
    before = renders(world)

    result = asked(
        world,
        """
        RESULT = await client.queue_endpoint_request(
            endpoint, "/generate/sync", PAYLOAD, worker_timeout=3, timeout=60
        )
        """,
        PAYLOAD=payload(a_graph(16, sleep_s=11), request_id="a-long-film"),
    )

    assert result["response"]["status"] == "completed"
    assert result["response"]["id"] == "a-long-film"
    assert renders(world) == before + 1


def test_checklist_44_a_payload_that_is_no_object_is_refused_as_422(world: FleetWorld) -> None:
    result = asked(world, 'RESULT = await endpoint.request("/generate/sync", PAYLOAD)', PAYLOAD=[1, 2])

    assert (result["ok"], result["status"]) == (False, 422)


class _LateControlPlane(BaseHTTPRequestHandler):
    """Key and reports, for a worker that started before there was any control plane."""

    pem = b""
    reports: list[dict[str, Any]] = []  # noqa: RUF012 - one per test run

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.pem)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reports.append(body)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        return


def test_checklist_62_our_worker_waits_for_its_control_plane_as_long_as_it_takes(tmp_path: Path) -> None:
    port, agent, side, wrapper, engine = (free_port() for _ in range(5))
    _LateControlPlane.pem = (
        Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    command = f"{sys.executable} -m comfyfleet.testing.fake_engine --job-s 0.01"
    worker = subprocess.Popen(
        [sys.executable, "-m", "comfyfleet", "worker"],
        env={
            **os.environ,
            "CONTAINER_ID": "7",
            "REPORT_ADDR": f"http://127.0.0.1:{port}",
            "MASTER_TOKEN": "m",
            "WORKER_PORT": str(agent),
            "WORKER_HTTP_PORT": str(side),
            "COMFYFLEET_DATA_DIR": str(tmp_path / "data"),
            "COMFYFLEET_WRAPPER_PORT": str(wrapper),
            "COMFYFLEET_ENGINE_PORT": str(engine),
            "COMFYFLEET_ENGINE_COMMAND": command,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stderr is not None
    try:
        complaints = 0
        for line in worker.stderr:  # it complains every other second; the public worker gives up after the fifth
            complaints += "ticket_key.unavailable" in line
            if complaints > 5:
                break
        server = ThreadingHTTPServer(("127.0.0.1", port), _LateControlPlane)
        Thread(target=server.serve_forever, daemon=True).start()
        drain = Thread(target=worker.stderr.read, daemon=True)
        drain.start()
        until = time.monotonic() + 120
        while not any(report.get("max_perf", 0) > 0 for report in _LateControlPlane.reports):
            assert time.monotonic() < until, _LateControlPlane.reports[-3:]
            time.sleep(0.1)
        assert worker.poll() is None
        server.shutdown()
        server.server_close()
    finally:
        worker.terminate()
        worker.wait(timeout=90)
        drain.join(timeout=60)
        worker.stderr.close()


def test_checklist_63_after_a_restart_of_the_control_plane_workers_are_routable_again_within_12_s(
    world: FleetWorld,
) -> None:
    before = {row["id"]: row for row in world.worker_rows()}
    pids = worker_pids(world)

    world.plane.kill()
    killed = time.monotonic()
    with Yardstick() as machine:
        world.plane.start()
        world.until_ready()
    assert time.monotonic() - killed < 5.0 + 12 * machine.slowdown  # 5: a stall that no average shows

    after = {row["id"]: row for row in world.worker_rows()}
    assert {i: row["measured_perf"] for i, row in after.items()} == pytest.approx(
        {i: row["measured_perf"] for i, row in before.items()}
    )
    assert worker_pids(world) == pids
    result = asked(world, 'RESULT = await endpoint.request("/generate/sync", PAYLOAD)', PAYLOAD=payload(a_graph(17)))
    assert result["ok"]

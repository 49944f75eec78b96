"""A control plane over a real Ray cluster: nodes die, freeze and come back, the head is lost, and the fleet holds.

Workers are real, with a fake engine under each; the cluster's GPUs are only counted. What is promised after each fault:
every accepted job ends well, the fleet is back at its target, no former life of a worker is left running or heard.
"""

from __future__ import annotations

import contextlib
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from support.control_plane import ControlPlane
from support.fleet_world import a_graph
from support.ray_cluster import RayCluster, ray_cluster, until

pytestmark = [pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"), pytest.mark.timeout(600)]

WORKERS = 2
LIMIT_S = 120.0


class RayWorld:
    """A cluster of two nodes with two GPUs each, and an endpoint that wants two workers."""

    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        self.cluster = cluster
        self.numbers = iter(range(1, 1_000_000))
        self.jobs: list[str] = []
        command = f"{sys.executable} -m comfyfleet.testing.fake_engine --job-s 0.02"
        self.plane = ControlPlane(
            folder / "control",
            arguments=["--fleet", "ray", "--ray-address", cluster.address],
            environment={
                "COMFYFLEET_ENGINE_COMMAND": command,
                "COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1",
                "COMFYFLEET_LOST_AFTER_S": "5",
                **cluster.mark,
            },
        )

    def start(self) -> RayWorld:
        self.plane.start()
        body = {"endpoint_name": "comfy", "cold_workers": WORKERS, "max_workers": WORKERS, "min_load": 1e9}
        assert self.plane.call("POST", "/api/v0/endptjobs/", {**body, "max_queue_time": 30})[0] == 200
        group = {"endpoint_name": "comfy", "template_hash": "local", "search_params": "dph_total<=1.5"}
        assert self.plane.call("POST", "/api/v0/workergroups/", group)[0] == 200
        self.until_whole()
        return self

    def fleet(self, what: str) -> dict:
        status, answer = self.plane.call("GET", f"/v1/fleet/{what}")
        assert status == 200, answer
        return answer

    def workers(self) -> list[dict]:
        return self.fleet("workers")["workers"]

    def until_whole(self) -> None:
        """As many workers Ready as wanted, each running somewhere."""

        def is_whole() -> bool:
            rows = self.workers()
            good = [row for row in rows if row["status"] == "idle" and row["presence"] == "running" and row["node"]]
            return len(rows) == len(good) == WORKERS

        until(is_whole, LIMIT_S, tell=lambda: f"{self.workers()}\n{self.fleet('events')}\n{self.plane.log[-3000:]}")

    def submit(self, count: int = 3) -> None:
        for _ in range(count):
            body = {"endpoint": "comfy", "input": {"workflow_json": a_graph(next(self.numbers))}}
            status, answer = self.plane.call("POST", "/v1/jobs", body)
            assert status == 202, answer
            self.jobs.append(answer["id"])

    def until_done(self) -> None:
        """Every job accepted so far has ended well."""

        def are_done() -> bool:
            jobs = [self.plane.call("GET", f"/v1/jobs/{number}")[1] for number in self.jobs]
            assert not [job for job in jobs if job["status"] in ("failed", "cancelled")], jobs
            return all(job["status"] == "completed" for job in jobs)

        until(are_done, LIMIT_S, tell=lambda: self.plane.log[-3000:])

    def processes(self, node: str = "") -> list[psutil.Process]:
        """The workers' own processes (not their engines, not the shells over them), on one node or on all."""
        found = []
        for process in self.cluster.processes():
            with contextlib.suppress(psutil.Error):
                words, folder = process.cmdline(), process.environ().get("COMFYFLEET_WORKER_DIR", "")
                if words[-1:] == ["worker"] and words[0] != "sh" and folder.startswith(str(self.cluster.disk(node))):
                    found.append(process)
        return found

    def incarnations(self) -> dict[int, str]:
        return {row["id"]: row["incarnation"] for row in self.workers()}

    def place(self) -> dict[int, str]:
        return {row["id"]: row["node"] for row in self.workers()}


def one_life_each(world: RayWorld) -> None:
    """One process for each worker's name in the whole cluster, and it is the one that the control plane knows."""

    def is_so() -> bool:
        lives = []
        for process in world.processes():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                lives.append((int(environment["CONTAINER_ID"]), environment["COMFYFLEET_INCARNATION"]))
        return sorted(lives) == sorted(world.incarnations().items())

    until(is_so, LIMIT_S, tell=lambda: f"{world.processes()}\n{world.workers()}\n{world.plane.log[-3000:]}")


def kill_a_node(world: RayWorld, node: str) -> None:
    """kill -9 of a raylet. Its workers' processes outlive it; others take their names, and they end."""
    world.submit()
    before = world.incarnations()
    moved = [number for number, at in world.place().items() if at == node]
    world.cluster.kill_node(node)
    until(lambda: all(world.incarnations()[number] != before[number] for number in moved), LIMIT_S)
    world.submit()
    world.until_whole()
    assert node not in world.place().values()


def freeze_a_node(world: RayWorld, node: str) -> None:
    """A partition: raylet and workers hear and say nothing, their names are taken, and then they are back."""
    before = world.incarnations()
    moved = [number for number, at in world.place().items() if at == node]
    frozen = world.processes(node)
    world.cluster.freeze_node(node)
    for process in frozen:
        process.suspend()
    world.submit()
    until(lambda: all(world.incarnations()[number] != before[number] for number in moved), LIMIT_S)
    world.until_whole()
    present, urls = world.incarnations(), {row["id"]: row["url"] for row in world.workers()}

    world.cluster.thaw_node(node)
    for process in frozen:
        process.resume()
    world.submit()
    _, alive = psutil.wait_procs(frozen, timeout=LIMIT_S)

    assert alive == [], "told that its life is over, it ends"
    assert world.incarnations() == present
    assert {row["id"]: row["url"] for row in world.workers()} == urls, "what it still had to say was not heard"
    world.cluster.end_node(node)


def kill_a_worker(world: RayWorld, dice: random.Random) -> None:
    world.submit()
    dice.choice(world.processes()).kill()
    world.submit()


def lose_the_head(world: RayWorld, nodes: list[str]) -> None:
    """Workers serve on; nothing new starts, and the state says why; the next head finds them as they were."""
    lives, running = world.incarnations(), {process.pid for process in world.processes()}
    world.cluster.kill_head()
    until(lambda: world.fleet("nodes")["trouble"], LIMIT_S)
    world.submit()
    world.until_done()
    rows = world.workers()
    assert [row["status"] for row in rows] == ["idle"] * WORKERS
    assert "Ray" in world.fleet("nodes")["trouble"]
    assert "head.lost" in [event["kind"] for event in world.fleet("events")["events"]]

    for node in nodes:
        world.cluster.end_node(node)
    world.cluster.start_head()
    for node in nodes:
        world.cluster.start_node(node, labels="dph_total=1.0")
    until(lambda: world.fleet("nodes")["trouble"] == "", LIMIT_S, tell=lambda: str(world.fleet("nodes")))

    def is_adopted() -> bool:
        free = {row["name"]: row["free_gpus"] for row in world.fleet("nodes")["nodes"] if row["is_alive"]}
        return sum(free.get(node, 0) for node in nodes) == 2 * len(nodes) - WORKERS

    until(is_adopted, LIMIT_S, tell=lambda: str(world.fleet("nodes")))
    assert world.incarnations() == lives
    assert {process.pid for process in world.processes()} == running


@contextlib.contextmanager
def ray_world(folder: Path):
    with ray_cluster({"a": 2, "b": 2}, labels="dph_total=1.0") as cluster:
        world = RayWorld(folder, cluster)
        try:
            yield world.start()
        finally:
            world.plane.close()


@pytest.mark.slow
def test_a_fleet_on_ray_outlives_its_nodes_and_its_head_and_no_worker_has_two_lives(tmp_path):
    with ray_world(tmp_path) as world:
        assert {row["price_hour"] for row in world.workers()} == {0.5}, "half of its machine each, by the label"

        home = next(iter(world.place().values()))
        other = "b" if home == "a" else "a"
        kill_a_node(world, home)
        one_life_each(world)
        assert set(world.place().values()) == {other}

        world.cluster.start_node(home, labels="dph_total=1.0")
        freeze_a_node(world, other)
        one_life_each(world)

        lose_the_head(world, [home])
        one_life_each(world)
        world.until_done()


@pytest.mark.soak
@pytest.mark.timeout(14_400)
def test_a_hundred_random_faults(tmp_path):
    dice = random.Random(7)
    with ray_world(tmp_path) as world:
        for _ in range(100):
            fault = dice.choice(["node", "freeze", "worker", "head"])
            node = dice.choice(["a", "b"])
            if fault == "node":
                kill_a_node(world, node)
                world.cluster.start_node(node, labels="dph_total=1.0")
            elif fault == "freeze":
                freeze_a_node(world, node)
                world.cluster.start_node(node, labels="dph_total=1.0")
            elif fault == "worker":
                kill_a_worker(world, dice)
            else:
                lose_the_head(world, ["a", "b"])
            world.until_whole()
            one_life_each(world)
            world.until_done()
            world.jobs.clear()

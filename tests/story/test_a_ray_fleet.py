"""A control plane over a real Ray cluster: nodes die, freeze and come back, the head is lost, and the fleet holds.

Workers are real, with a fake engine under each; the cluster's GPUs are only counted. What is promised after each fault:
every accepted job ends well, the fleet is back at its target, no former life of a worker is left running or heard.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from importlib.util import find_spec

import psutil
import pytest
from click.testing import CliRunner

from comfyfleet.cli.main import command
from support.ray_cluster import until
from support.ray_world import LIMIT_S, WORKERS, RayWorld, ray_world

pytestmark = [pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"), pytest.mark.timeout(600)]


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
    victim = dice.choice(world.processes())
    victim.kill()
    until(lambda: victim not in world.processes(), LIMIT_S)
    world.submit()


def kill_the_control_plane(world: RayWorld) -> None:
    world.plane.kill()
    world.plane.start()
    world.submit()


def lose_the_head(world: RayWorld, homes: list[str]) -> None:
    """Workers serve on; nothing new starts, and the state says why; the next head finds them as they were."""
    lives, running = world.incarnations(), {process.pid for process in world.processes()}
    world.cluster.kill_head()

    def is_said() -> bool:
        """A control plane that has just begun says it too, once it has asked in vain."""
        told = [event["kind"] for event in world.fleet("events")["events"] if event["kind"].startswith("head.")]
        return told[-1:] == ["head.lost"]

    until(is_said, LIMIT_S)
    world.submit()
    world.until_done()
    rows = world.workers()
    assert [row["status"] for row in rows] == ["idle"] * WORKERS
    assert "Ray" in world.fleet("nodes")["trouble"]
    world.want(WORKERS + 1)
    until(lambda: "nothing new starts until it answers" in world.decisions(), LIMIT_S, tell=world.decisions)
    assert {process.pid for process in world.processes()} == running
    world.want(WORKERS)

    for node in list(world.cluster.nodes):
        world.cluster.end_node(node)
    world.cluster.start_head()
    for node in homes:
        world.cluster.start_node(node, labels="dph_total=1.0")
    until(lambda: world.fleet("nodes")["trouble"] == "", LIMIT_S, tell=lambda: str(world.fleet("nodes")))

    def is_adopted() -> bool:
        free = {row["name"]: row["free_gpus"] for row in world.fleet("nodes")["nodes"] if row["is_alive"]}
        return sum(free.get(node, 0) for node in homes) == 2 * len(homes) - WORKERS

    until(is_adopted, LIMIT_S, tell=lambda: str(world.fleet("nodes")))
    assert world.incarnations() == lives
    assert {process.pid for process in world.processes()} == running


def typed(world: RayWorld, *words: str) -> str:
    """What a user reads who types `comfyfleet` and these words."""
    env = {"COMFYFLEET_URL": world.plane.base, "COMFYFLEET_API_KEY": world.plane.key, "HOME": str(world.plane.folder)}
    done = CliRunner().invoke(command, words, env=env)
    assert done.exit_code == 0, done.output
    return done.stdout


def rendered_once(world: RayWorld, *, is_engine_lost: bool) -> None:
    """Every job; and once more for each worker that the fault took it from."""
    jobs, renders = world.until_done(), world.renders()
    often = {number: job["attempts"] if is_engine_lost else 1 for number, job in jobs.items()}

    assert [number for number in jobs if not 1 <= renders[number] <= often[number]] == [], f"{jobs}\n{renders}"


FAULTS = ("node", "freeze", "worker", "head", "plane")


def break_it(world: RayWorld, fault: str, dice: random.Random) -> None:
    """One fault, some moment after jobs came in; then wait until everything promised is so again."""
    print(
        time.monotonic(), f"next: {fault}; nodes {sorted(world.cluster.nodes)}, workers at {world.place()}"
    )  # shown when it fails
    if fault in ("node", "freeze"):
        for node in {"a", "b"} - set(world.cluster.nodes):
            world.cluster.start_node(node, labels="dph_total=1.0")
    homes = sorted(set(world.place().values()))
    world.submit(dice.randint(1, 6))
    time.sleep(dice.uniform(0.0, 0.5))
    match fault:
        case "node":
            kill_a_node(world, dice.choice(homes))
        case "freeze":
            freeze_a_node(world, dice.choice(homes))
        case "worker":
            kill_a_worker(world, dice)
        case "head":
            lose_the_head(world, homes)
        case "plane":
            kill_the_control_plane(world)
    one_life_each(world)
    world.until_whole()
    rendered_once(world, is_engine_lost=fault in ("node", "freeze", "worker"))
    world.jobs.clear()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7])
def test_a_fleet_on_ray_outlives_five_faults_in_any_order_and_no_worker_has_two_lives(tmp_path, seed):
    dice = random.Random(seed)
    with ray_world(tmp_path) as world:
        assert {row["price_hour"] for row in world.workers()} == {0.5}, "half of its machine each, by the label"

        assert re.search(r"^a +\S+ +alive +2 ", typed(world, "fleet", "nodes"), re.MULTILINE)
        assert typed(world, "fleet", "workers").count("running") == WORKERS
        assert "node.joined" in typed(world, "fleet", "events")

        for fault in dice.sample(FAULTS, k=len(FAULTS)):
            break_it(world, fault, dice)


@pytest.mark.soak
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("seed", [7])
def test_a_hundred_random_faults(tmp_path, seed):
    dice = random.Random(seed)
    with ray_world(tmp_path) as world:
        began = time.monotonic()
        for _ in range(100):
            break_it(world, dice.choice(FAULTS), dice)
        renders = world.renders()
        print(
            f"100 faults in {time.monotonic() - began:.0f} s: {len(renders)} jobs, none lost; "
            f"{renders.total()} renders, {renders.total() - len(renders)} of them again for a lost worker"
        )

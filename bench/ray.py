"""The Ray fleet, on a real cluster of this machine: how long Ray and we take, beside what a worker itself needs.

A worker's own start is left out by looking at when its process begins, not at when it serves: from the wish to the
process is ours, from the process to Ready is the worker's. GPUs are only counted; engines are fake.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import anyio
import psutil

from bench.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the cluster that the tests break

UP_GOAL_S, DEFAULT_GOAL_S, TIGHT_GOAL_S = 4.0, 20.0, 8.0
ROUNDS = 3


def figures() -> list[Figure]:
    """Nothing where Ray is not installed."""
    if find_spec("ray") is None:
        return []
    from support.ray_cluster import TIGHT, ray_cluster

    with tempfile.TemporaryDirectory() as folder:
        with ray_cluster({"a": 2, "b": 2}) as cluster:
            ups = anyio.run(_three_up, cluster, Path(folder) / "up")
        tight = _moved_after_a_kill(Path(folder) / "tight", TIGHT)
        default = _moved_after_a_kill(Path(folder) / "default", {})
    return [
        _figure("ray: 3 workers up on a warm cluster, less their own start", statistics.median(ups), UP_GOAL_S),
        _figure(
            "ray: a killed node's workers elsewhere, Ray's health settings, less their own start",
            default,
            DEFAULT_GOAL_S,
        ),
        _figure("ray: the same at tightened health settings (1 s, 3 misses)", tight, TIGHT_GOAL_S),
    ]


def _figure(name: str, value: float, goal: float) -> Figure:
    return Figure(name=name, value=value, unit="s", goal=goal, better="lower")


async def _three_up(cluster, folder: Path) -> list[float]:
    """Seconds from the first `create` to the third process, for each of some rounds."""
    from comfyfleet.control.fleet.base import WorkerSpec

    fleet = cluster.fleet(folder, command=("sleep", "600"))
    took = []
    try:
        while sum(node.is_alive for node in await fleet.nodes()) < 3:
            await fleet.list()
            await anyio.sleep(0.2)
        await anyio.sleep(5.0)  # the keepers are up: a warm cluster
        for turn in range(ROUNDS):
            began = time.perf_counter()
            for number in range(1, 4):
                spec = WorkerSpec(id=10 * turn + number, mtoken="", incarnation=f"i{turn}")
                await fleet.create(spec)
            while not all(worker.node for worker in await fleet.list()):  # noqa: ASYNC110 - other processes do it
                await anyio.sleep(0.02)
            took.append(time.perf_counter() - began)
            for worker in await fleet.list():
                await fleet.destroy(worker.id, grace_s=1.0)
    finally:
        await fleet.close(keep_running=False)
    return took


def _moved_after_a_kill(folder: Path, health: dict[str, int]) -> float:
    """Seconds from kill -9 of a node's raylet to the last begin of a worker's process elsewhere."""
    from support.ray_world import ray_world

    with ray_world(folder, system_config=health) as world:
        node = next(iter(world.place().values()))
        before, moving = world.incarnations(), [number for number, at in world.place().items() if at == node]
        killed_at = time.time()
        world.cluster.kill_node(node)
        while not all(world.incarnations()[number] != before[number] for number in moving):
            time.sleep(0.2)
        world.until_whole()
        present = world.incarnations()
        began = []
        for process in world.processes():
            environment = process.environ()
            number = int(environment["CONTAINER_ID"])
            if number in moving and environment["COMFYFLEET_INCARNATION"] == present[number]:
                began.append(psutil.Process(process.pid).create_time())
        return max(began) - killed_at


if __name__ == "__main__":
    for figure in figures():
        print(figure)

"""Ray's own autoscaler starts and ends machines for what our control plane asks of it; nothing of ours starts one.

The cluster begins with a head and no machine. Ray's node provider here starts raylets of this machine; whichever a user
has, Ray's autoscaler is told the same, and the second one hears labels too.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from support.ray_cluster import RayCluster, until
from support.ray_world import LIMIT_S, RayWorld

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.timeout(600),
    pytest.mark.slow,
]


def a_machine(**labels: str) -> dict:
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": 80_000_000}
    return {"resources": resources, "labels": labels, "node_config": {}, "min_workers": 0, "max_workers": 1}


def machines(world: RayWorld) -> list[dict]:
    """Those with a GPU that are there now."""
    return [row for row in world.fleet("nodes")["nodes"] if row["is_alive"] and row["gpus"]]


def test_a_waiting_request_has_a_machine_started_and_an_idle_worker_lets_it_go(tmp_path):
    kinds = {"slow": a_machine(gpu_name="T4", dph_total="0.1"), "fast": a_machine(gpu_name="RTX_4090", dph_total="1.0")}
    cluster = RayCluster(autoscaler="v2", node_types=kinds)
    world = RayWorld(tmp_path, cluster)
    try:
        cluster.start(nodes={})
        world.plane.start()
        body = {"endpoint_name": "comfy", "cold_workers": 0, "max_workers": 1, "min_load": 0, "inactivity_timeout": 1}
        assert world.plane.call("POST", "/api/v0/endptjobs/", body)[0] == 200
        group = {"endpoint_name": "comfy", "template_hash": "local", "search_params": "gpu_name='rtx 4090'"}
        assert world.plane.call("POST", "/api/v0/workergroups/", group)[0] == 200
        assert machines(world) == []

        world.submit(1)
        world.until_done(limit_s=2 * LIMIT_S)  # a machine starts first

        assert [(row["gpu_name"], row["price_hour"]) for row in machines(world)] == [("RTX_4090", 1.0)]
        assert [row["price_hour"] for row in world.workers()] == [1.0]
        until(lambda: len(cluster.wanted()) == 1, LIMIT_S)

        until(lambda: machines(world) == [], LIMIT_S, tell=lambda: f"{cluster.wanted()}\n{world.plane.log[-3000:]}")
        assert cluster.wanted() == []
        assert "node.lost" in [event["kind"] for event in world.fleet("events")["events"]]
    finally:
        world.plane.close()
        cluster.close()

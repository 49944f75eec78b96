"""What runs in the cluster. Plain classes: `ray_cluster` makes Ray actors of them, `ray_node` does the work.

`worker-<id>` holds one worker's GPUs and memory in Ray's books for as long as its process is to run, and starts it.
`keeper-<node>` holds nothing; it answers for every worker that has its folder on its machine, stopped ones and those of
a lost cluster too. `demand` is the one that tells Ray's autoscaler how many machines are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comfyfleet.clock import SystemClock
from comfyfleet.control.fleet.base import WorkerSpec
from comfyfleet.control.fleet.ray_demand import Portion, Wish
from comfyfleet.control.fleet.ray_node import Node, NodeWorker, WorkerPlan
from comfyfleet.settings.node import node_settings

DEMAND_KEPT_S = 120.0
STATUS_LIMIT_S = 3.0
JUDGED_S = 8.0  # Ray's autoscaler thinks every 5 s


def _here(plan: WorkerPlan) -> Node:
    import ray

    return Node(plan, node_settings(), ray.util.get_node_ip_address())


class WorkerActor:
    """Owns one worker's place in the cluster, and its process."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._node = _here(plan)

    def launch(self, spec: WorkerSpec) -> tuple[str, NodeWorker]:
        """Start the process; the id of the node it is on, and the worker."""
        import ray

        return ray.get_runtime_context().get_node_id(), self._node.launch(spec)

    def adopt(self) -> str:
        """Hold the place of a process that runs already; the id of the node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())


class KeeperActor:
    """Answers for one machine."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._node = _here(plan)

    def workers(self) -> list[NodeWorker]:
        return self._node.workers()

    def stop(self, worker_id: int, grace_s: float) -> None:
        self._node.stop(worker_id, grace_s)

    def destroy(self, worker_id: int, grace_s: float) -> None:
        self._node.destroy(worker_id, grace_s)

    def logs(self, worker_id: int, tail: int) -> str:
        return self._node.logs(worker_id, tail)


class DemandActor:
    """Every control plane says what it wants; this asks Ray for all of it: `request_resources` keeps the last only."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._wanted: dict[str, tuple[float, Mapping[str, Wish], Sequence[Wish]]] = {}
        self._portion = Portion()
        self._missing: Sequence[Wish] = ()
        self._asked: Sequence[Wish] = ()
        self._asked_at = 0.0

    def want(self, owner: str, held: Mapping[str, Wish], refused: Sequence[Wish]) -> int:
        """Replaces what this owner wanted; how many places are asked for now. An owner unheard of is forgotten.

        held: by the worker's name in the cluster, as several control planes see the same workers.
        """
        from ray.autoscaler.sdk import request_resources

        now = self._clock.now()
        self._wanted[owner] = (now, held, refused)
        self._wanted = {name: kept for name, kept in self._wanted.items() if now - kept[0] < DEMAND_KEPT_S}
        kept = {name: wish for _, theirs, _ in self._wanted.values() for name, wish in theirs.items()}
        missing = [wish for _, _, theirs in self._wanted.values() for wish in theirs]
        is_judged = now - self._asked_at > JUDGED_S
        if is_judged or missing != self._missing:
            self._asked = self._portion.of(missing, is_unmet=is_judged and _is_unmet())
            self._missing, self._asked_at = missing, now
        every = [*kept.values(), *self._asked]
        selectors = [dict(wish.labels) for wish in every]
        request_resources(
            bundles=[dict(wish.bundle) for wish in every],
            bundle_label_selectors=selectors if any(selectors) else None,
        )
        return len(every)


def _is_unmet() -> bool:
    """Whether Ray's second autoscaler says so of the last request; the first meets what it can and says nothing."""
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    status = GetClusterStatusReply()
    status.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=STATUS_LIMIT_S))
    return bool(status.autoscaling_state.infeasible_cluster_resource_constraints)

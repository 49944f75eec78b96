"""The cluster as Ray's own API shows it: look at it, place workers on it, end them. Blocking; every wait has a limit.

Runs in a process of its own (`ray_gateway`): Ray ends a process that was connected when its head is gone for a minute.
Nothing here decides how many workers there should be, and Ray decides where one goes.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import NoCapacity, Presence, WorkerSpec
from comfyfleet.control.fleet.needs import is_fit
from comfyfleet.control.fleet.ray_actors import DemandActor, KeeperActor, WorkerActor
from comfyfleet.control.fleet.ray_demand import Wish
from comfyfleet.control.fleet.ray_keepers import ASK_S, Keepers
from comfyfleet.control.fleet.ray_node import WorkerPlan
from comfyfleet.control.fleet.ray_view import RAM_RESOURCE, Look, NodeView, Placed, Placing, node_view

PROBE_S = 0.3
ROOM_WAIT_S = 3.0
PLACE_LIMIT_S = 30.0
ADOPT_EVERY_S = 10.0
_POLL_S = 0.05
DEMAND_NAMESPACE = "comfyfleet-demand"  # of every fleet in the cluster
HEAD_RESOURCE = "node:__internal_head__"


class Cluster:
    """One connection; safe to use from several threads."""

    def __init__(self, *, address: str, namespace: str, plan: WorkerPlan, clock: Clock) -> None:
        self._address = address
        self._namespace = namespace
        self._plan = plan
        self._clock = clock
        self._keepers = Keepers(self._keeper, clock)
        self._placing: dict[int, Placing] = {}
        self._adopted_at: dict[int, float] = {}
        self._gone: set[str] = set()
        self._looking = threading.Lock()

    def connect(self) -> None:
        """Raises ConnectionError and what else Ray raises."""
        ray.init(
            address=self._address,
            namespace=self._namespace,
            log_to_driver=False,
            configure_logging=False,
            logging_level="error",
        )

    # --- looking -------------------------------------------------------------------------------------------------
    def look(self) -> Look:
        """Everything, as of now; a machine that does not answer at once counts as it was."""
        with self._looking:
            rows = ray.nodes()
            free = _free_resources()
            machines = {
                row["NodeID"]: row["Resources"]["GPU"]
                for row in rows
                if row["Alive"] and row["Resources"].get("GPU") and row["NodeID"] not in self._gone
            }
            busy = [number for number, gpus in machines.items() if free.get(number, {}).get("GPU", 0.0) < gpus]
            self._keepers.ask(machines, busy)
            rows = [{**row, "Alive": row["Alive"] and not self._is_gone(row)} for row in rows]
            views = [
                node_view(row, free.get(row["NodeID"], {}), is_heard=self._keepers.is_heard(row["NodeID"]))
                for row in rows
            ]
            placed = self._keepers.placed()
            self._adopt(placed)
            at: dict[str, list[int]] = {one.node_id: [] for one in placed}
            for one in placed:
                at[one.node_id].append(one.worker.seen.id)
            nodes = tuple(
                msgspec.structs.replace(
                    view, facts=msgspec.structs.replace(view.facts, workers=tuple(at.get(view.id, ())))
                )
                for view in views
            )
            return Look(nodes=nodes, placed=placed, placing=tuple(self._placing.values()))

    def _is_gone(self, row: Mapping[str, Any]) -> bool:
        """Ray takes 15 s to call a machine dead. A keeper that does not answer, on a machine that refuses connections
        to its raylet's port, says so at once: that raylet is no more, and never comes back under this id."""
        number = str(row["NodeID"])
        if number not in self._gone and self._keepers.is_silent(number):
            try:
                socket.create_connection((row["NodeManagerAddress"], row["NodeManagerPort"]), PROBE_S).close()
            except ConnectionRefusedError:
                self._gone.add(number)
            except OSError:
                return False  # unreachable may be a moment's trouble: Ray decides
        if number in self._gone:
            self._keepers.forget(number)
        return number in self._gone

    def _adopt(self, placed: Sequence[Placed]) -> None:
        """Give a process that runs without a place in this cluster its place: a lost cluster or actor had it."""
        names = self._names()
        for one in placed:
            number, now = one.worker.seen.id, self._clock.monotonic()
            is_without = one.worker.seen.presence is Presence.RUNNING and f"worker-{number}" not in names
            if is_without and number not in self._placing and self._adopted_at.get(number, 0.0) < now - ADOPT_EVERY_S:
                self._adopted_at[number] = now
                kept = one.worker.reservation
                actor = self._actor(WorkerActor, f"worker-{number}", node_id=one.node_id, num_gpus=kept.num_gpus)
                actor.adopt.remote()

    # --- placing -------------------------------------------------------------------------------------------------
    def create(self, spec: WorkerSpec) -> None:
        """Begin to place a new worker; what becomes of it is seen by `look`. Raises NoCapacity."""
        if self._keepers.holders(spec.id) or self._is_on_its_way(spec.id):
            return
        self._place(spec)

    def start(self, spec: WorkerSpec) -> None:
        """Begin to start it again, where its folder is if there is room, else elsewhere. Raises NoCapacity."""
        holders = self._keepers.holders(spec.id)
        is_running = any(
            one.worker.seen.presence is Presence.RUNNING and one.worker.reservation.incarnation == spec.incarnation
            for one in holders
        )
        if is_running or self._is_on_its_way(spec.id):
            return
        self._place(spec, home=holders[0].node_id if holders else "")

    def _place(self, spec: WorkerSpec, home: str = "") -> None:
        fits, room = self._until_room(spec)
        self._end_actor(spec.id)
        options: dict[str, Any] = {"num_gpus": spec.num_gpus}
        if home in {node.id for node in room}:
            options["node_id"] = home
        else:
            options["label_selector"] = {"ray.io/node-id": f"in({','.join(node.id for node in fits)})"}
        if spec.gpu_ram_gb and all(node.has_ram for node in fits):
            options["resources"] = {RAM_RESOURCE: spec.gpu_ram_gb * spec.num_gpus}
        self._placing[spec.id] = Placing(id=spec.id, since=self._clock.now(), gpus=spec.num_gpus)
        threading.Thread(target=self._launch, args=(spec, options), name=f"place {spec.id}", daemon=True).start()

    def _is_on_its_way(self, worker_id: int) -> bool:
        placing = self._placing.get(worker_id)
        return placing is not None and not placing.error

    def _until_room(self, spec: WorkerSpec) -> tuple[list[NodeView], list[NodeView]]:
        """(machines that fit, those of them with room). Ray's books lag behind a stop, so this waits a moment."""
        until = self._clock.monotonic() + ROOM_WAIT_S
        while True:
            look = self.look()
            fits = [node for node in look.nodes if node.facts.is_alive and is_fit(spec.search, node.facts)]
            if not fits:
                asked = f" with {spec.search_params}" if spec.search_params else ""
                raise NoCapacity(f"no machine{asked} is in the Ray cluster")
            room = [node for node in fits if node.facts.free_gpus >= spec.num_gpus]
            names, ids = self._names(), {node.id for node in fits}
            held = sum(
                one.worker.reservation.num_gpus
                for one in look.placed
                if one.node_id in ids
                and f"worker-{one.worker.seen.id}" in names
                and one.worker.seen.id not in self._placing
            )
            coming = sum(placing.gpus for placing in list(self._placing.values()))
            if room and sum(node.facts.gpus for node in fits) - held - coming >= spec.num_gpus:
                return fits, room
            if self._clock.monotonic() > until:
                raise NoCapacity(f"every GPU that fits is taken, on {len(fits)} machines of the Ray cluster")
            threading.Event().wait(_POLL_S)

    def _launch(self, spec: WorkerSpec, options: dict[str, Any]) -> None:
        """In a thread of its own: until the process runs, or there was no place after all."""
        error = ""
        actor = None
        try:
            actor = self._actor(WorkerActor, f"worker-{spec.id}", **options)
            launched = actor.launch.remote(spec)
            ready, _ = ray.wait([launched], timeout=PLACE_LIMIT_S)
            if not ready:
                error = f"Ray found no room for it in {PLACE_LIMIT_S:.0f} s"
            else:
                node_id, worker = ray.get(launched, timeout=ASK_S)
                with self._looking:
                    self._keepers.noted(node_id, worker)
        except Exception as problem:  # thread boundary: whatever Ray raises is why the worker is not there
            error = f"it could not be started there: {type(problem).__name__}: {problem}".splitlines()[0]
        if error and actor is not None:
            ray.kill(actor)
        if error:
            self._placing[spec.id] = Placing(id=spec.id, since=self._clock.now(), error=error)
        else:
            self._placing.pop(spec.id, None)

    # --- ending --------------------------------------------------------------------------------------------------
    def stop(self, worker_id: int, grace_s: float) -> None:
        """End its process, then give its GPUs back; its folder stays."""
        self._end("stop", worker_id, grace_s)

    def destroy(self, worker_id: int, grace_s: float) -> None:
        """End it and remove its folder, wherever it has one."""
        self._end("destroy", worker_id, grace_s)

    def clear(self, node_id: str, worker_id: int) -> None:
        """Remove what a worker left behind on a machine when it was started elsewhere."""
        if self._keepers.is_heard(node_id):
            self._keepers.call(node_id, "destroy", worker_id, 1.0, limit_s=20.0)
            self.look()

    def _end(self, how: str, worker_id: int, grace_s: float) -> None:
        self._until_placed(worker_id)
        for one in self._keepers.holders(worker_id):
            self._keepers.call(one.node_id, how, worker_id, grace_s, limit_s=grace_s + 20.0)
            self.look()
        self._end_actor(worker_id)

    def _until_placed(self, worker_id: int) -> None:
        until = self._clock.monotonic() + PLACE_LIMIT_S + 5.0
        while self._is_on_its_way(worker_id) and self._clock.monotonic() < until:
            threading.Event().wait(_POLL_S)
        self._placing.pop(worker_id, None)

    def _end_actor(self, worker_id: int) -> None:
        name = f"worker-{worker_id}"
        if name not in self._names():
            return
        try:
            ray.kill(ray.get_actor(name, namespace=self._namespace))
        except (ValueError, ray.exceptions.RayError):
            return
        until = self._clock.monotonic() + 5.0
        while name in self._names() and self._clock.monotonic() < until:
            threading.Event().wait(_POLL_S)

    def logs(self, worker_id: int, tail: int) -> str:
        """ "" of a worker without a folder."""
        return "".join(
            str(self._keepers.call(one.node_id, "logs", worker_id, tail, limit_s=10.0))
            for one in self._keepers.holders(worker_id)[:1]
        )

    def demand(self, owner: str, held: Mapping[str, Wish], refused: Sequence[Wish]) -> None:
        """Tell Ray's autoscaler what this control plane wants room for, through the one actor of the cluster that may.

        On the head's machine: an actor elsewhere would keep that machine from being idle.
        """
        actor = self._actor(DemandActor, "demand", namespace=DEMAND_NAMESPACE, resources={HEAD_RESOURCE: 0.001})
        mine = {f"{self._namespace}/{number}": wish for number, wish in held.items()}
        ray.get(actor.want.remote(f"{self._namespace}/{owner}", mine, refused), timeout=10.0)

    # --- Ray -----------------------------------------------------------------------------------------------------
    def _keeper(self, node_id: str) -> Any:
        return self._actor(KeeperActor, f"keeper-{node_id}", node_id=node_id, max_concurrency=8)

    def _names(self) -> set[str]:
        return set(ray.util.list_named_actors())

    def _actor(self, kind: type, name: str, *, node_id: str = "", **options: Any) -> Any:
        if node_id:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
        made = ray.remote(kind).options(
            name=name, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=0, **options
        )
        return made.remote() if kind is DemandActor else made.remote(self._plan)


def _free_resources() -> Mapping[str, Mapping[str, float]]:
    """By machine. Ray has no public call for it without its dashboard."""
    from ray._private.state import available_resources_per_node

    found: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return found

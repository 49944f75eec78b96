"""The cluster as Ray's own API shows it: look at it, place workers on it, end them. Blocking; every wait has a limit.

Runs in a process of its own (`ray_gateway`): Ray ends a process that was connected when its head is gone for a minute.
Nothing here decides how many workers there should be, and Ray decides where one goes.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import NoCapacity, Presence, WorkerSpec
from comfyfleet.control.fleet.needs import is_fit
from comfyfleet.control.fleet.ray_actors import DemandActor, KeeperActor, WorkerActor
from comfyfleet.control.fleet.ray_node import NodeWorker, WorkerPlan
from comfyfleet.control.fleet.ray_view import RAM_RESOURCE, Look, NodeView, Placed, Placing, node_view

ASK_S = 1.5
PROBE_S = 0.3
ROOM_WAIT_S = 3.0
PLACE_LIMIT_S = 30.0
ADOPT_EVERY_S = 10.0
_POLL_S = 0.05


class _Keeper:
    """A machine's keeper: what it told last, and the question it has not answered yet."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.question: Any = None
        self.workers: dict[int, NodeWorker] = {}
        self.is_heard = False
        self.has_answered = False  # the last time it was asked


class Cluster:
    """One connection; safe to use from several threads."""

    def __init__(self, *, address: str, namespace: str, plan: WorkerPlan, clock: Clock) -> None:
        self._address = address
        self._namespace = namespace
        self._plan = plan
        self._clock = clock
        self._keepers: dict[str, _Keeper] = {}
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
            self._ask_keepers([row["NodeID"] for row in rows if row["Alive"] and row["Resources"].get("GPU")])
            rows = [{**row, "Alive": row["Alive"] and not self._is_gone(row)} for row in rows]
            views = [
                node_view(row, free.get(row["NodeID"], {}), is_heard=self._is_heard(row["NodeID"])) for row in rows
            ]
            placed = [
                Placed(node_id=node_id, worker=worker)
                for node_id, keeper in self._keepers.items()
                for worker in keeper.workers.values()
            ]
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
            return Look(nodes=nodes, placed=tuple(placed), placing=tuple(self._placing.values()))

    def _is_gone(self, row: Mapping[str, Any]) -> bool:
        """Ray takes 15 s to call a machine dead. A keeper that does not answer, on a machine that refuses connections
        to its raylet's port, says so at once: that raylet is no more, and never comes back under this id."""
        number = str(row["NodeID"])
        keeper = self._keepers.get(number)
        if number not in self._gone and keeper is not None and not keeper.has_answered:
            try:
                socket.create_connection((row["NodeManagerAddress"], row["NodeManagerPort"]), PROBE_S).close()
            except ConnectionRefusedError:
                self._gone.add(number)
            except OSError:
                return False  # unreachable may be a moment's trouble: Ray decides
        if number in self._gone:
            self._keepers.pop(number, None)
        return number in self._gone

    def _is_heard(self, node_id: str) -> bool:
        keeper = self._keepers.get(node_id)
        return keeper is not None and keeper.is_heard

    def _ask_keepers(self, alive: Sequence[str]) -> None:
        for node_id in [known for known in self._keepers if known not in alive]:
            del self._keepers[node_id]
        for node_id in alive:
            if node_id in self._gone:
                continue
            keeper = self._keepers.setdefault(node_id, _Keeper(None))
            if keeper.handle is None:
                keeper.handle = self._actor(
                    KeeperActor, f"keeper-{node_id}", node_id=node_id, max_restarts=-1, max_concurrency=8
                )
            if keeper.question is None:
                keeper.question = keeper.handle.workers.remote()
        questions = [keeper.question for keeper in self._keepers.values()]
        if not questions:
            return
        ready, _ = ray.wait(questions, num_returns=len(questions), timeout=ASK_S)
        for keeper in self._keepers.values():
            keeper.has_answered = False
            if keeper.question not in ready:
                continue
            question, keeper.question = keeper.question, None
            try:
                told = ray.get(question, timeout=ASK_S)
            except ray.exceptions.RayError:
                keeper.handle = None  # it died; the next look makes another
            else:
                keeper.workers = {worker.seen.id: worker for worker in told}
                keeper.is_heard = keeper.has_answered = True

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
        if self._holders(spec.id) or self._is_on_its_way(spec.id):
            return
        self._place(spec)

    def start(self, spec: WorkerSpec) -> None:
        """Begin to start it again, where its folder is if there is room, else elsewhere. Raises NoCapacity."""
        holders = self._holders(spec.id)
        is_running = any(
            keeper.workers[spec.id].seen.presence is Presence.RUNNING
            and keeper.workers[spec.id].reservation.incarnation == spec.incarnation
            for _, keeper in holders
        )
        if is_running or self._is_on_its_way(spec.id):
            return
        self._place(spec, home=holders[0][0] if holders else "")

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
                    keeper = self._keepers.get(node_id)
                    if keeper is not None:
                        keeper.workers[spec.id] = worker
                        keeper.question = None  # asked before this worker was there
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
        self._end(worker_id, lambda keeper: keeper.handle.stop.remote(worker_id, grace_s), grace_s)

    def destroy(self, worker_id: int, grace_s: float) -> None:
        """End it and remove its folder, wherever it has one."""
        self._end(worker_id, lambda keeper: keeper.handle.destroy.remote(worker_id, grace_s), grace_s)

    def clear(self, node_id: str, worker_id: int) -> None:
        """Remove what a worker left behind on a machine when it was started elsewhere."""
        keeper = self._keepers.get(node_id)
        if keeper is not None and keeper.handle is not None:
            ray.get(keeper.handle.destroy.remote(worker_id, 1.0), timeout=20.0)
            self._ask_again(keeper)

    def _end(self, worker_id: int, ask: Callable[[_Keeper], Any], grace_s: float) -> None:
        self._until_placed(worker_id)
        for _, keeper in self._holders(worker_id):
            ray.get(ask(keeper), timeout=grace_s + 20.0)
            self._ask_again(keeper)
        self._end_actor(worker_id)

    def _until_placed(self, worker_id: int) -> None:
        until = self._clock.monotonic() + PLACE_LIMIT_S + 5.0
        while self._is_on_its_way(worker_id) and self._clock.monotonic() < until:
            threading.Event().wait(_POLL_S)
        self._placing.pop(worker_id, None)

    def _ask_again(self, keeper: _Keeper) -> None:
        """What it told before is outdated."""
        with self._looking:
            keeper.question = None
        self.look()

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
        return "".join(
            str(ray.get(keeper.handle.logs.remote(worker_id, tail), timeout=10.0))
            for _, keeper in self._holders(worker_id)[:1]
        )

    def demand(self, owner: str, bundles: Sequence[Mapping[str, float]], labels: Sequence[Mapping[str, str]]) -> None:
        """Tell Ray's autoscaler what this control plane wants room for, through the one actor that may."""
        actor = self._actor(DemandActor, "demand", max_restarts=-1)
        ray.get(actor.want.remote(owner, bundles, labels), timeout=10.0)

    # --- Ray -----------------------------------------------------------------------------------------------------
    def _holders(self, worker_id: int) -> list[tuple[str, _Keeper]]:
        """Machines that have its folder, the one where it runs first."""
        found = [(node_id, keeper) for node_id, keeper in self._keepers.items() if worker_id in keeper.workers]
        return sorted(found, key=lambda one: one[1].workers[worker_id].seen.presence is not Presence.RUNNING)

    def _names(self) -> set[str]:
        return set(ray.util.list_named_actors())

    def _actor(self, kind: type, name: str, *, node_id: str = "", **options: Any) -> Any:
        if node_id:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
        made = ray.remote(kind).options(
            name=name, lifetime="detached", get_if_exists=True, num_cpus=0, **{"max_restarts": 0, **options}
        )
        return made.remote() if kind is DemandActor else made.remote(self._plan)


def _free_resources() -> Mapping[str, Mapping[str, float]]:
    """By machine. Ray has no public call for it without its dashboard."""
    from ray._private.state import available_resources_per_node

    found: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return found

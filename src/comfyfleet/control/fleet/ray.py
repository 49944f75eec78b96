"""Workers on the machines of a Ray cluster. Ray places them; this says which, with what, and what became of them.

Every call to Ray is made by a process of its own (`ray_gateway`) and waited for in a thread, so neither a slow cluster
nor a lost head holds up a control plane. While the cluster does not answer, `list` tells what was last known
(`ray_picture`): workers serve on without Ray, and their own reports say how they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import FleetEvent, FleetNode, FleetWorker, NoCapacity, Presence, WorkerSpec
from comfyfleet.control.fleet.events import EventLog
from comfyfleet.control.fleet.ray_demand import Demand, Wish, wish
from comfyfleet.control.fleet.ray_gateway import Hello, Question
from comfyfleet.control.fleet.ray_link import LinkDown, RayLink
from comfyfleet.control.fleet.ray_node import WorkerPlan
from comfyfleet.control.fleet.ray_picture import Picture
from comfyfleet.control.fleet.ray_view import Look, present_nodes
from comfyfleet.ids import Ids
from comfyfleet.settings.control import ControlSettings
from comfyfleet.wire.errors import FleetError, NotFound, Unavailable

LOOK_EVERY_S = 0.5
LOOK_LIMIT_S = 4.0
GIVE_UP_S = 10.0
FIRST_LOOK_S = 20.0
CALL_S = 30.0
# Of this process's environment, what every worker gets wherever it runs.
_SHARED = ("S3_", "WEBHOOK_", "HF_", "CIVITAI_", "COMFYFLEET_ENGINE_COMMAND", "COMFYFLEET_ALLOWED_PRIVATE_HOSTS")

# `list` is a method below, so the types that mention the other one are named here.
Workers = list[FleetWorker]


class RaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """address: the head's `host:port`. namespace: what keeps this fleet's actors apart from others' in the cluster.

    owner: this control plane's name among those that share the cluster. inherited: what the gateway starts from.
    """

    data_dir: Path
    address: str
    plan: WorkerPlan
    inherited: Mapping[str, str]
    namespace: str = "comfyfleet"
    owner: str = "control"


class RayFleet:
    """Implements `base.FleetProvider`."""

    def __init__(self, settings: RaySettings, clock: Clock) -> None:
        if importlib.util.find_spec("ray") is None:
            raise Unavailable('the fleet `ray` needs Ray: pip install "comfyfleet[ray]"')
        self._clock = clock
        self._events = EventLog(clock)
        self._picture = Picture(settings.data_dir / "ray-fleet.json", self._events, clock)
        self._link = RayLink(
            Hello(address=settings.address, namespace=settings.namespace, plan=settings.plan),
            log_path=settings.data_dir / "ray-gateway.log",
            environment={**settings.inherited, "RAY_USAGE_STATS_ENABLED": "0"},
            clock=clock,
        )
        self._owner = settings.owner
        self._demand = Demand()
        self._seen_once = threading.Event()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._threads: anyio.CapacityLimiter | None = None

    @property
    def capacity(self) -> int | None:
        """Machines come and go."""
        return None

    @property
    def trouble(self) -> str:
        return self._picture.trouble

    async def list(self) -> Workers:
        await self._watching()
        return self._picture.workers()

    async def nodes(self) -> Sequence[FleetNode]:
        await self._watching()
        return present_nodes(self._picture.nodes)

    def events(self) -> Sequence[FleetEvent]:
        return self._events.all()

    async def create(self, spec: WorkerSpec) -> None:
        await self._watching()
        await self._place("create", spec)

    async def start(self, spec: WorkerSpec) -> None:
        await self._watching()
        if spec.id not in self._picture.known():
            raise NotFound("this worker does not exist here", worker_id=spec.id)
        await self._place("start", spec)

    async def _place(self, op: str, spec: WorkerSpec) -> None:
        if self._picture.trouble:
            raise NoCapacity(self._picture.trouble)
        try:
            await self._ask(Question(number=0, op=op, spec=spec), CALL_S)
        except NoCapacity as problem:
            self._demand.refused(spec, self._wish(spec), self._clock.monotonic())
            self._events.add("worker.no_room", problem.message, worker_id=spec.id)
            raise
        except LinkDown as problem:
            raise NoCapacity(problem.message) from problem
        self._picture.placed(spec)
        self._demand.placed(spec, self._wish(spec))
        self._events.add("worker.placed", "Ray is placing it", worker_id=spec.id)
        await self._look_now()

    def _wish(self, spec: WorkerSpec) -> Wish:
        return wish(spec, [node.facts for node in self._picture.nodes])

    async def stop(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        known = self._picture.known().get(worker_id)
        if known is None or known.seen.presence is Presence.STOPPED:
            return
        try:
            await self._ask(Question(number=0, op="stop", worker_id=worker_id, grace_s=grace_s), grace_s + 60.0)
        except LinkDown as problem:  # it may run on: not stopped, and not to be started a second time either
            raise NoCapacity(problem.message) from problem
        self._picture.stopped(known)
        self._demand.ended(worker_id)
        await self._look_now()

    async def drain(self, worker_id: int) -> None:
        """Nothing to tell: routing has stopped, and `stop` sends SIGTERM: "finish, then end"."""

    async def destroy(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        if worker_id not in self._picture.known():
            return
        with contextlib.suppress(LinkDown):  # found again when its machine is, and destroyed then
            await self._ask(Question(number=0, op="destroy", worker_id=worker_id, grace_s=grace_s), grace_s + 60.0)
        self._picture.destroyed(worker_id)
        self._demand.ended(worker_id)
        self._events.add("worker.destroyed", "its folder is removed", worker_id=worker_id)
        await self._look_now()

    async def logs(self, worker_id: int, tail: int) -> str:
        if tail <= 0 or worker_id not in self._picture.known():
            return ""
        with contextlib.suppress(LinkDown):
            answer = await self._ask(Question(number=0, op="logs", worker_id=worker_id, tail=tail), CALL_S)
            return msgspec.json.decode(answer, type=str)
        return ""

    async def close(self, *, keep_running: bool) -> None:
        if not keep_running:
            async with anyio.create_task_group() as ending:
                for number in self._picture.known():
                    ending.start_soon(self._close_one, number)
        self._closed.set()
        await anyio.to_thread.run_sync(self._link.close)
        if self._watcher is not None:
            await anyio.to_thread.run_sync(self._watcher.join)

    async def _close_one(self, worker_id: int) -> None:
        with contextlib.suppress(FleetError):
            await self.stop(worker_id, grace_s=8.0)

    # --- asking --------------------------------------------------------------------------------------------------
    async def _ask(self, question: Question, timeout_s: float) -> msgspec.Raw:
        """In a thread, so that a slow cluster holds up nobody else."""
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(32)
        return await anyio.to_thread.run_sync(
            lambda: self._link.ask(question, timeout_s), abandon_on_cancel=True, limiter=self._threads
        )

    async def _look_now(self) -> None:
        await anyio.to_thread.run_sync(self._look)

    async def _watching(self) -> None:
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="ray watcher", daemon=True)
            self._watcher.start()
            if not self._picture.known():
                await anyio.to_thread.run_sync(lambda: self._seen_once.wait(FIRST_LOOK_S))

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._look()
            self._seen_once.set()
            self._tell_demand()
            self._closed.wait(LOOK_EVERY_S)

    def _look(self) -> None:
        """Ask once, and fold in what is seen; without an answer, say so and keep what was known."""
        asked = self._picture.known()
        try:
            look = msgspec.json.decode(self._link.ask(Question(number=0, op="look"), LOOK_LIMIT_S), type=Look)
        except FleetError as problem:
            self._unanswered(problem.message)
            return
        self._demand.holds(look.placed)
        for node_id, worker_id in self._picture.answered(look, asked):
            with contextlib.suppress(FleetError):
                self._link.ask(Question(number=0, op="clear", node_id=node_id, worker_id=worker_id), CALL_S)
                self._events.add("worker.cleared", "what it left on another machine is removed", worker_id=worker_id)
        self._picture.keep()

    def _unanswered(self, why: str) -> None:
        if self._closed.is_set():
            return
        if self._picture.unanswered(why) > GIVE_UP_S:
            self._link.restart()
            self._picture.wait_anew()
        self._seen_once.set()

    def _tell_demand(self) -> None:
        wanted = self._demand.news(self._clock.monotonic())
        if wanted is None or self._picture.trouble:
            return
        question = Question(
            number=0, op="demand", owner=self._owner, held=dict(wanted.held), refused=list(wanted.refused)
        )
        with contextlib.suppress(FleetError):
            self._link.ask(question, CALL_S)
            self._demand.told(wanted, self._clock.monotonic())


def ray_fleet(settings: ControlSettings, clock: Clock, ids: Ids, files_key: bytes) -> RayFleet:
    """The fleet that a control plane's settings name. Raises Unavailable where Ray is not installed.

    Workers get what this control plane knows of storage and webhooks, since the machines they run on need not; the key
    of signed URLs goes along in their environment, as they share no folder.
    """
    shared = {name: value for name, value in settings.inherited.items() if name.startswith(_SHARED)}
    plan = WorkerPlan(
        report_url=settings.base_url,
        environment=shared,
        own_environment={"COMFYFLEET_FILES_URL": settings.base_url, "COMFYFLEET_FILES_KEY": files_key.hex()},
    )
    return RayFleet(
        RaySettings(
            data_dir=settings.data_dir,
            address=settings.ray_address,
            plan=plan,
            inherited=settings.inherited,
            namespace=settings.ray_namespace,
            owner=ids.request_id(),
        ),
        clock,
    )

"""Workers as processes of this machine, each in a folder and a session of its own (`local_folders`).

Workers survive a control plane that is killed, and the next one takes them over; they end with one that stops in order.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import anyio
import anyio.abc
import msgspec
import psutil

from comfyfleet.clock import Clock
from comfyfleet.control.fleet import detached
from comfyfleet.control.fleet.base import FleetEvent, FleetNode, FleetWorker, NoCapacity, Presence, WorkerSpec
from comfyfleet.control.fleet.events import EventLog
from comfyfleet.control.fleet.local_folders import FOLDER_VARIABLE, LocalFolders, LocalRecord, last_lines
from comfyfleet.control.fleet.machine import described
from comfyfleet.control.fleet.needs import is_fit
from comfyfleet.control.fleet.slots import PortClaims, Slot, find_slot
from comfyfleet.control.shared_folder import NotOurTurn, our_turn
from comfyfleet.settings.machine import OWNER_VARIABLE
from comfyfleet.wire.errors import NotFound

_POLL_S = 0.05
_SHOWN_POLL_S, _SHOWN_LIMIT_S = 0.002, 2.0
_REAP_S = 5.0
_TURN_S = 5.0


OUR_WORKER = (sys.executable, "-m", "comfyfleet", "worker")


class LocalSettings(msgspec.Struct, frozen=True, kw_only=True):
    """report_url: where workers reach the control plane. base_environment: what every child inherits.

    command: what a worker process is. slots: how many workers fit on this machine; first_slot: the number of the
    first. is_detached: workers are nobody's children, and end only when told to. machine: what searches are held
    against; None: anything fits.
    """

    data_dir: Path
    report_url: str
    slots: int
    base_environment: Mapping[str, str]
    public_address: str = "127.0.0.1"
    command: Sequence[str] = OUR_WORKER
    own_environment: Mapping[str, str] = {}
    first_slot: int = 0
    is_detached: bool = False
    machine: FleetNode | None = None


class LocalFleet:
    """Implements `base.FleetProvider`."""

    def __init__(self, settings: LocalSettings, clock: Clock, *, find: Callable[..., Slot] | None = None) -> None:
        self._settings = settings
        self._clock = clock
        self._find_slot = find or functools.partial(find_slot, is_free=PortClaims().claim)
        self._folders = LocalFolders(settings.data_dir / "workers")
        self._children: dict[int, anyio.abc.Process] = {}
        self._lock = anyio.Lock()
        self._events = EventLog(clock)

    @property
    def capacity(self) -> int | None:
        return self._settings.slots

    async def list(self) -> list[FleetWorker]:
        records = self._folders.records()
        for record in records:
            await self._reaped(record)
        return [self._seen(record) for record in records]

    @property
    def trouble(self) -> str:
        return ""

    async def nodes(self) -> Sequence[FleetNode]:
        records = self._folders.records()
        running = sum(self._process(record) is not None for record in records)
        slots, machine = self._settings.slots, self._settings.machine
        here = machine or FleetNode(
            name=platform.node(), address=self._settings.public_address, is_alive=True, gpus=slots
        )
        return [
            msgspec.structs.replace(
                here, free_gpus=max(0, slots - running), workers=tuple(record.id for record in records)
            )
        ]

    def events(self) -> Sequence[FleetEvent]:
        return self._events.all()

    @contextlib.asynccontextmanager
    async def _slots(self) -> AsyncIterator[None]:
        """The slots to ourselves: other control planes of this machine may give them out too. Raises NoCapacity."""
        async with self._lock:
            try:
                async with our_turn(self._folders.root / ".slots.lock", self._clock, _TURN_S):
                    yield
            except NotOurTurn as error:
                raise NoCapacity("another control plane of this machine is starting workers") from error

    async def create(self, spec: WorkerSpec) -> None:
        async with self._slots():
            if self._folders.has(spec.id):
                return
            self._demand_fit(spec)
            taken = self._folders.records()
            numbers = {record.slot.number for record in taken}
            first = self._settings.first_slot
            free = next(
                (number for number in range(first, first + self._settings.slots) if number not in numbers), None
            )
            if free is None:
                raise NoCapacity(f"all {self._settings.slots} slots of this machine are taken")
            self._folders.of(spec.id).mkdir(parents=True, exist_ok=True)
            slot = self._find_slot(free, {port for record in taken for port in record.slot.ports})
            await self._launch(LocalRecord(id=spec.id, slot=slot), spec)

    def _demand_fit(self, spec: WorkerSpec) -> None:
        """Raises NoCapacity where this machine is not what the workergroup searches for."""
        machine = self._settings.machine
        if machine is not None and not is_fit(spec.search, machine):
            raise NoCapacity(
                f"the workergroup searches for {spec.search_params or dict(spec.search)}, "
                f"and this machine has {described(machine)}"
            )

    async def start(self, spec: WorkerSpec) -> None:
        async with self._slots():
            record = self._folders.record(spec.id)
            if record is None:
                raise NotFound("this worker does not exist here", worker_id=spec.id)
            if self._process(record) is not None:
                return
            taken = {port for other in self._folders.records() if other.id != spec.id for port in other.slot.ports}
            slot = self._find_slot(record.slot.number, taken)
            await self._launch(msgspec.structs.replace(record, slot=slot, exit_code=None), spec)

    async def stop(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        record = self._folders.record(worker_id)
        if record is None:
            return
        await self._end(record, grace_s)
        self._folders.write(msgspec.structs.replace(record, pid=0, process_started=0.0, exit_code=None))
        self._events.add("worker.stopped", "its folder is kept", worker_id=worker_id)

    async def drain(self, worker_id: int) -> None:
        """Nothing to tell a local process: `stop` sends SIGTERM, which our worker takes as "finish, then end"."""

    async def destroy(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        record = self._folders.record(worker_id)
        if record is not None:
            await self._end(record, grace_s)
        await anyio.to_thread.run_sync(self._folders.remove, worker_id)
        self._events.add("worker.destroyed", "its folder is removed", worker_id=worker_id)

    async def logs(self, worker_id: int, tail: int) -> str:
        path = self._folders.log(worker_id)
        if tail <= 0 or not path.exists():
            return ""
        return await anyio.to_thread.run_sync(lambda: last_lines(path, tail))

    async def close(self, *, keep_running: bool) -> None:
        if keep_running:
            return
        async with anyio.create_task_group() as ending:
            for record in self._folders.records():
                if record.pid:
                    ending.start_soon(self._close_one, record.id)

    async def _close_one(self, worker_id: int) -> None:
        await self.stop(worker_id, grace_s=8.0)

    # --- processes -----------------------------------------------------------------------------------------------
    async def _launch(self, record: LocalRecord, spec: WorkerSpec) -> None:
        folder = self._folders.of(record.id)
        self._folders.rotate_log(record.id)
        environment = self._environment(record.slot, folder, spec)
        if self._settings.is_detached:
            pid = await anyio.to_thread.run_sync(
                lambda: detached.spawn(self._settings.command, folder=folder, environment=environment)
            )
        else:
            with self._folders.log(record.id).open("ab") as output:
                process = await anyio.open_process(
                    [*self._settings.command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=folder,
                    env=environment,
                    start_new_session=True,
                )
            self._children[record.id] = process
            pid = process.pid
        started = 0.0
        with contextlib.suppress(psutil.Error), anyio.move_on_after(_SHOWN_LIMIT_S):
            started = psutil.Process(pid).create_time()
            # The kernel lets the parent go on a moment before it shows the child's environment, which is the proof.
            while not psutil.Process(pid).environ():  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(_SHOWN_POLL_S)
        self._folders.write(
            msgspec.structs.replace(
                record,
                pid=pid,
                process_started=started,
                started_at=self._clock.now(),
                incarnation=spec.incarnation,
            )
        )
        self._events.add("worker.started", f"pid {pid}, port {record.slot.agent}", worker_id=record.id)

    def _environment(self, slot: Slot, folder: Path, spec: WorkerSpec) -> dict[str, str]:
        address, data_dir = self._settings.public_address, self._settings.data_dir
        return {
            **self._settings.base_environment,
            **spec.environment,
            "CONTAINER_ID": str(spec.id),
            "REPORT_ADDR": self._settings.report_url,
            "MASTER_TOKEN": spec.mtoken,
            "WORKER_PORT": str(slot.agent),
            f"VAST_TCP_PORT_{slot.agent}": str(slot.agent),
            "PUBLIC_IPADDR": address,
            "USE_SSL": "false",
            "UNSECURED": "false",
            "COMFYFLEET_DATA_DIR": str(data_dir),
            FOLDER_VARIABLE: str(folder),
            "COMFYFLEET_WRAPPER_PORT": str(slot.wrapper),
            "COMFYFLEET_ENGINE_PORT": str(slot.engine),
            "COMFYFLEET_INCARNATION": spec.incarnation,
            OWNER_VARIABLE: str(data_dir.resolve()),
            **self._settings.own_environment,
        }

    def _process(self, record: LocalRecord) -> psutil.Process | None:
        """The living process of a record; a child that ended may still be shown."""
        child = self._children.get(record.id)
        if child is not None and child.pid == record.pid and child.returncode is not None:
            return None
        return self._folders.process(record)

    async def _reaped(self, record: LocalRecord) -> None:
        """A child that has just ended: its exit code arrives through the event loop, just after its process went."""
        child = self._children.get(record.id)
        if (
            child is None
            or child.pid != record.pid
            or child.returncode is not None
            or self._process(record) is not None
        ):
            return
        with anyio.move_on_after(_REAP_S):
            await child.wait()

    def _seen(self, record: LocalRecord) -> FleetWorker:
        if not record.pid:
            return FleetWorker(id=record.id, presence=Presence.STOPPED, started_at=record.started_at)
        if self._process(record) is not None:
            return FleetWorker(id=record.id, presence=Presence.RUNNING, started_at=record.started_at)
        child = self._children.get(record.id)
        code = child.returncode if child is not None and child.pid == record.pid else None
        if self._settings.is_detached:
            code = detached.exit_code(self._folders.of(record.id))
        return FleetWorker(
            id=record.id,
            presence=Presence.EXITED,
            exit_code=code,
            started_at=record.started_at,
            detail=_ending(code),
        )

    async def _end(self, record: LocalRecord, grace_s: float) -> None:
        """SIGTERM to the worker; after the grace, SIGKILL to it and to whatever still runs of its tree and session."""
        process = self._process(record)
        family = []
        if process is not None:
            with contextlib.suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
            with contextlib.suppress(psutil.Error):
                process.terminate()
            with anyio.move_on_after(grace_s):
                while self._process(record) is not None:  # noqa: ASYNC110 - an adopted process is nobody's child
                    await anyio.sleep(_POLL_S)
        family.extend(self._folders.session(record.id))
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
        child = self._children.pop(record.id, None)
        if child is not None:
            with anyio.move_on_after(5.0):
                await child.wait()
        with anyio.move_on_after(5.0):  # a killed process is there for another moment, with its ports and its folder
            while any(_lives(member) for member in family):  # noqa: ASYNC110 - nobody tells of an adopted one's end
                await anyio.sleep(_POLL_S)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _ending(code: int | None) -> str:
    if code is None:
        return "the process is gone"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"

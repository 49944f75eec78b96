"""One machine of a Ray cluster: the workers in its data directory, as processes that outlive Ray.

Runs on the machine itself, inside Ray's actors (`ray_actors`); knows nothing of Ray but its address. All state is on
the disk, in the folders of the local provider, which does the work; so any process of the machine may ask, and what a
lost cluster left running is found again by the next.
"""

from __future__ import annotations

import fcntl
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import msgspec

from comfyfleet.clock import SystemClock
from comfyfleet.control.fleet.base import FleetWorker, Presence, WorkerSpec
from comfyfleet.control.fleet.local import OUR_WORKER, LocalFleet, LocalSettings
from comfyfleet.control.fleet.slots import find_slot, is_free
from comfyfleet.settings.node import NodeSettings

_SLOTS = 10_000  # Ray counts the GPUs; stopped workers have folders and ports too


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the control plane gives every worker of the fleet. environment: over the node's own, under the template's.

    command: () for the node's own `comfyfleet worker`.
    """

    report_url: str
    environment: Mapping[str, str] = {}
    own_environment: Mapping[str, str] = {}
    command: Sequence[str] = ()


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """`ray.json`, beside `local.json`: what Ray holds for a worker, and which devices it really has."""

    incarnation: str
    num_gpus: float = 1.0
    gpu_ram_gb: float = 0.0
    devices: tuple[str, ...] = ()


class NodeWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that has its folder on this machine."""

    seen: FleetWorker
    reservation: Reservation


class Node:
    """Every call may block for as long as it takes; calls of several processes take turns where they must."""

    def __init__(self, plan: WorkerPlan, settings: NodeSettings, address: str) -> None:
        self._settings = settings
        self._folder = settings.data_dir / "workers"
        self._plan = plan
        self._address = settings.address or address

    def workers(self) -> list[NodeWorker]:
        """Those in this machine's folder, running or not."""
        found = []
        for seen in anyio.run(self._fleet(()).list):
            with suppress(OSError, msgspec.DecodeError):
                found.append(NodeWorker(seen=seen, reservation=self._reservation(seen.id)))
        return found

    def launch(self, spec: WorkerSpec) -> NodeWorker:
        """Make it, or start it again with this incarnation; a running former life of it is ended first."""
        with self._locked():
            devices = free_devices(self._settings.devices, self._devices_in_use(spec.id))
            fleet = self._fleet(devices)
            folder = self._folder / str(spec.id)
            if (folder / "local.json").exists():
                anyio.run(fleet.stop, spec.id)
                anyio.run(fleet.start, spec)
            else:
                anyio.run(fleet.create, spec)
            reservation = Reservation(
                incarnation=spec.incarnation, num_gpus=spec.num_gpus, gpu_ram_gb=spec.gpu_ram_gb, devices=devices
            )
            (folder / "ray.json").write_bytes(msgspec.json.encode(reservation))
        return next(worker for worker in self.workers() if worker.seen.id == spec.id)

    def stop(self, worker_id: int, grace_s: float) -> None:
        anyio.run(functools.partial(self._fleet(()).stop, worker_id, grace_s=grace_s))

    def destroy(self, worker_id: int, grace_s: float) -> None:
        anyio.run(functools.partial(self._fleet(()).destroy, worker_id, grace_s=grace_s))

    def logs(self, worker_id: int, tail: int) -> str:
        return anyio.run(self._fleet(()).logs, worker_id, tail)

    def _fleet(self, devices: tuple[str, ...]) -> LocalFleet:
        address = self._address
        return LocalFleet(
            LocalSettings(
                data_dir=self._settings.data_dir,
                report_url=self._plan.report_url,
                slots=_SLOTS,
                first_slot=self._settings.first_slot,
                base_environment={**self._settings.inherited, **self._plan.environment},
                public_address=address,
                own_environment={
                    "COMFYFLEET_WORKER_HOST": address,
                    **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
                    **self._plan.own_environment,
                },
                is_detached=True,
                command=tuple(self._plan.command) or OUR_WORKER,
            ),
            SystemClock(),
            find=functools.partial(find_slot, is_free=lambda port: is_free(port, address)),
        )

    def _devices_in_use(self, except_id: int) -> frozenset[str]:
        return frozenset(
            device
            for worker in self.workers()
            if worker.seen.id != except_id and worker.seen.presence is Presence.RUNNING
            for device in worker.reservation.devices
        )

    def _reservation(self, worker_id: int) -> Reservation:
        path = self._folder / str(worker_id) / "ray.json"
        return (
            msgspec.json.decode(path.read_bytes(), type=Reservation) if path.exists() else Reservation(incarnation="")
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One launch at a time on a machine: two would take one port."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path: Path = self._folder / ".launching"
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def free_devices(own: tuple[str, ...], in_use: frozenset[str]) -> tuple[str, ...]:
    """The devices Ray chose, less those that a worker of a lost cluster still holds, which others stand in for.

    Ray cannot be told which device an adopted process has, and may give the same number out again.
    """
    if not own or not in_use & frozenset(own) or not all(device.isdigit() for device in own):
        return own
    spare = (str(number) for number in range(len(in_use) + len(own)) if str(number) not in in_use)
    kept = [device for device in own if device not in in_use]
    return tuple(kept + [device for device in spare if device not in kept][: len(own) - len(kept)])

"""The contract of a fleet provider; every implementation passes `tests/contract/test_fleet.py`.

A provider owns processes (or containers), not decisions. A worker exists from `create` to `destroy`; in between it is
started or stopped any number of times and keeps its id and its folder. Every call may be repeated: starting a running
worker, stopping a stopped one and destroying an absent one do nothing. `list` tells what is really there, so that a
control plane which restarted, or lost a call, finds out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from comfyfleet.wire.errors import Unavailable


class NoCapacity(Unavailable):
    """The provider has no place for another worker now. Not a failure of any worker."""

    code = "no_capacity"


class Presence(StrEnum):
    """What a provider can say of a worker."""

    RUNNING = "running"
    STOPPED = "stopped"  # stopped by us: folder and id kept
    EXITED = "exited"  # it was running and ended by itself
    LOST = "lost"  # the node it ran on is gone: no fault of the worker


class FleetWorker(msgspec.Struct, frozen=True, kw_only=True):
    """One worker the provider has. exit_code: of an EXITED one; None unknown. started_at: epoch s, 0 never."""

    id: int
    presence: Presence
    exit_code: int | None = None
    started_at: float = 0.0
    detail: str = ""
    node: str = ""  # the name of the machine it is on, "" where there is only one
    address: str = ""
    gpu_name: str = ""  # by the node's labels
    price_hour: float = 0.0  # of its share of the node, by the node's labels; 0 unknown


class FleetNode(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that workers run on. gpus, free_gpus: may be parts of one; price_hour: of the whole node."""

    name: str
    address: str
    is_alive: bool
    gpus: float = 0.0
    free_gpus: float = 0.0
    gpu_name: str = ""
    gpu_ram_gb: float = 0.0  # of one GPU, 0 unknown
    price_hour: float = 0.0
    workers: tuple[int, ...] = ()
    labels: Mapping[str, str] = {}


class FleetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to the fleet, for an operator to read. kind: `head.lost`, `node.joined`, …"""

    at: float
    kind: str
    text: str
    node: str = ""
    worker_id: int = 0


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a new worker is made of. environment: its template's and the account's variables (may hold secrets).

    search: the workergroup's parsed `search_params`, `{field: {operator: value}}`; what of it a provider can tell
    apart is its business. num_gpus and gpu_ram_gb (per GPU, 0 any) are the parts of it that are reserved.
    """

    id: int
    mtoken: str
    incarnation: str
    environment: Mapping[str, str] = {}
    search_params: str = ""
    search: Mapping[str, Mapping[str, Any]] = {}
    gpu_ram_gb: float = 0.0
    num_gpus: float = 1.0


class FleetProvider(Protocol):
    """Makes, starts, stops and ends workers."""

    @property
    def capacity(self) -> int | None:
        """How many workers there is room for in all; None when nobody can tell."""
        ...

    @property
    def trouble(self) -> str:
        """Why nothing new can be started here now, or "". Workers that run are not concerned."""
        ...

    async def list(self) -> list[FleetWorker]:
        """Every worker that exists, running or not."""
        ...

    async def nodes(self) -> Sequence[FleetNode]:
        """The machines there are, dead ones included as long as they are remembered."""
        ...

    def events(self) -> Sequence[FleetEvent]:
        """What happened lately, oldest first; a bounded memory."""
        ...

    async def create(self, spec: WorkerSpec) -> None:
        """Make the worker and start it. Raises NoCapacity."""
        ...

    async def start(self, spec: WorkerSpec) -> None:
        """Start it again, with this environment and incarnation. Raises NotFound for one that does not exist."""
        ...

    async def stop(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        """End its processes (asked first, made to after `grace_s`), keep the rest."""
        ...

    async def drain(self, worker_id: int) -> None:
        """Tell it that it gets nothing new; it finishes what it has. Best effort: routing has stopped already."""
        ...

    async def destroy(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        """End it and remove what it kept."""
        ...

    async def logs(self, worker_id: int, tail: int) -> str:
        """The last `tail` lines it wrote; "" if there are none."""
        ...

    async def close(self, *, keep_running: bool) -> None:
        """The control plane ends. keep_running: the next one will find the workers by `list`."""
        ...

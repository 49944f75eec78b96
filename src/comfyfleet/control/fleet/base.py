"""The contract of a fleet provider; every implementation passes `tests/contract/test_fleet.py`.

A provider owns processes (or containers), not decisions. A worker exists from `create` to `destroy`; in between it is
started or stopped any number of times and keeps its id and its folder. Every call may be repeated: starting a running
worker, stopping a stopped one and destroying an absent one do nothing. `list` tells what is really there, so that a
control plane which restarted, or lost a call, finds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

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


class FleetWorker(msgspec.Struct, frozen=True, kw_only=True):
    """One worker the provider has. exit_code: of an EXITED one; None unknown. started_at: epoch s, 0 never."""

    id: int
    presence: Presence
    exit_code: int | None = None
    started_at: float = 0.0
    detail: str = ""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a new worker is made of. environment: its template's and the account's variables (may hold secrets)."""

    id: int
    mtoken: str
    incarnation: str
    environment: Mapping[str, str] = {}


class FleetProvider(Protocol):
    """Makes, starts, stops and ends workers."""

    @property
    def capacity(self) -> int | None:
        """How many workers there is room for in all; None when nobody can tell."""
        ...

    async def list(self) -> list[FleetWorker]:
        """Every worker that exists, running or not."""
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

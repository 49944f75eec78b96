"""A fleet provider without processes: keeps the contract of `control.fleet.base`, and fails when told to.

A test plays the workers itself (it reports for them), or uses `exit` to let one die.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import FleetEvent, FleetNode, FleetWorker, NoCapacity, Presence, WorkerSpec
from comfyfleet.wire.errors import NotFound

Workers = list[FleetWorker]


class FakeFleet:
    """Implements `FleetProvider`. specs: what each worker was last started with."""

    def __init__(self, clock: Clock, *, slots: int = 16) -> None:
        self._clock = clock
        self._slots = slots
        self._workers: dict[int, FleetWorker] = {}
        self.specs: dict[int, WorkerSpec] = {}
        self.calls: list[tuple[str, int]] = []
        self.trouble = ""
        self.starting = anyio.Event()  # what a start waits for; set: it does not
        self.starting.set()

    @property
    def capacity(self) -> int | None:
        return self._slots

    async def list(self) -> Workers:
        return [*self._workers.values()]

    async def nodes(self) -> Sequence[FleetNode]:
        return [FleetNode(name="fake", address="127.0.0.1", is_alive=True, gpus=self._slots)]

    def events(self) -> Sequence[FleetEvent]:
        return []

    async def create(self, spec: WorkerSpec) -> None:
        if spec.id in self._workers:
            return
        if len(self._workers) >= self._slots:
            raise NoCapacity(f"all {self._slots} slots are taken")
        self.calls.append(("create", spec.id))
        self._run(spec)

    async def start(self, spec: WorkerSpec) -> None:
        if spec.id not in self._workers:
            raise NotFound("this worker does not exist here", worker_id=spec.id)
        await self.starting.wait()
        if self._workers[spec.id].presence is not Presence.RUNNING:
            self.calls.append(("start", spec.id))
            self._run(spec)

    async def stop(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        if worker_id in self._workers:
            self.calls.append(("stop", worker_id))
            self._workers[worker_id] = FleetWorker(id=worker_id, presence=Presence.STOPPED)

    async def drain(self, worker_id: int) -> None:
        self.calls.append(("drain", worker_id))

    async def destroy(self, worker_id: int, *, grace_s: float = 10.0) -> None:
        if self._workers.pop(worker_id, None) is not None:
            self.calls.append(("destroy", worker_id))

    async def logs(self, worker_id: int, tail: int) -> str:
        lines = [f"{verb}\n" for verb, of in self.calls if of == worker_id and worker_id in self._workers]
        return "".join(lines[-tail:]) if tail > 0 else ""

    async def close(self, *, keep_running: bool) -> None:
        if not keep_running:
            for worker_id in list(self._workers):
                await self.stop(worker_id)

    def exit(self, worker_id: int, code: int = 1) -> None:
        """Let a running worker end by itself."""
        found = self._workers[worker_id]
        self._workers[worker_id] = FleetWorker(
            id=worker_id,
            presence=Presence.EXITED,
            exit_code=code,
            started_at=found.started_at,
            detail=f"exited with code {code}",
        )

    def lose(self, worker_id: int) -> None:
        """Its node is gone."""
        self._workers[worker_id] = FleetWorker(id=worker_id, presence=Presence.LOST, detail="its node is gone")

    def _run(self, spec: WorkerSpec) -> None:
        self.specs[spec.id] = spec
        self._workers[spec.id] = FleetWorker(id=spec.id, presence=Presence.RUNNING, started_at=self._clock.now())

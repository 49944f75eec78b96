"""A control plane's routing half in one process, on a fake clock, with a fake fleet whose workers a test plays."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec

from comfyfleet.control.catalog import Catalog
from comfyfleet.control.keys import Keyring
from comfyfleet.control.placements import TakeRequest
from comfyfleet.control.plane import RoutingPlane
from comfyfleet.control.records import Endpoint, Workergroup
from comfyfleet.control.search import parse_search
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.ids import SeededIds
from comfyfleet.testing.clock import FakeClock
from comfyfleet.testing.fleet import FakeFleet
from comfyfleet.wire.workers import FinishedRequest, FinishedRequests, WorkerStatusReport


class RoutingWorld:
    """`tick` is one pass of every loop; a played worker reports through `report`."""

    def __init__(self, folder: Path, *, clock: FakeClock | None = None, slots: int = 16, **endpoint) -> None:
        self.clock = clock or FakeClock()
        self.folder = folder
        self.endpoint = Endpoint(id=1, endpoint_name="comfy", created_at=0.0, **endpoint)
        self.group = Workergroup(id=1, endpoint_id=1, endpoint_name="comfy", created_at=0.0, template_hash="local")
        self.catalog = Catalog([self.endpoint], [self.group])
        self.keys = Keyring(admin_key="cfa_test", master=b"m" * 32, catalog=self.catalog, clock=self.clock)
        self.fleet = FakeFleet(self.clock, slots=slots)
        self.store = open_sqlite(folder / "control.sqlite3")
        self.plane = self._plane()
        self.ready: set[int] = set()

    def _plane(self) -> RoutingPlane:
        return RoutingPlane(
            data_dir=self.folder,
            catalog=self.catalog,
            keys=self.keys,
            store=self.store,
            provider=self.fleet,
            environment=lambda endpoint, group: {},
            clock=self.clock,
            ids=SeededIds(1),
        )

    async def __aenter__(self):
        await self.plane.load()
        self._tasks = anyio.create_task_group()
        tasks = await self._tasks.__aenter__()
        self.plane.lifecycle.attach(tasks)
        return self

    async def __aexit__(self, *error):
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(*error)
        await self.store.close()

    async def restart(self) -> None:
        """The control plane is replaced by a new one on the same store."""
        self.plane = self._plane()
        await self.plane.load()
        self.plane.lifecycle.attach(self._tasks)

    def change_endpoint(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.catalog.put_endpoint(endpoint)

    def search(self, text: str) -> None:
        """The group's `search_params` from now on."""
        self.group = msgspec.structs.replace(self.group, search_params=text, search_query=parse_search(text))
        self.catalog.put_workergroup(self.group)

    async def tick(self, seconds: float = 1.0) -> None:
        self.clock.jump(seconds)
        self.plane.desk.sweep()
        await self.plane.reconciler.step()
        await anyio.wait_all_tasks_blocked()

    async def run(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            await self.tick()
            for worker_id in self.ready:
                worker = self.plane.workers.get(worker_id)
                if worker is not None and worker.state == "idle" and self.clock.now() - worker.last_report_at >= 9:
                    self.report(worker_id)

    def worker_ids(self) -> list[int]:
        return sorted(worker.id for worker in self.plane.workers.all())

    def states(self) -> list[str]:
        return [str(worker.state) for worker in sorted(self.plane.workers.all(), key=lambda worker: worker.id)]

    def report(self, worker_id: int, *, score: float = 1.0, working: tuple[int, ...] = (), **fields) -> None:
        """A ready worker's report, unless the fields say otherwise."""
        worker = self.plane.workers.get(worker_id)
        spec = self.fleet.specs.get(worker_id)
        given = {
            "id": worker_id,
            "mtoken": worker.mtoken if spec is None else spec.mtoken,
            "loadtime": 5.0,
            "max_perf": score,
            "url": f"http://127.0.0.1:{3000 + 10 * worker_id}",
            "working_request_idxs": working,
            "num_requests_working": len(working),
            "cur_load": 100.0 * len(working),
            **fields,
        }
        self.ready.add(worker_id)
        self.plane.reports.status(WorkerStatusReport(**given))

    def finish(self, worker_id: int, request_idx: int, status: str = "Success", seconds: float = 1.0) -> None:
        """A worker says a request is over."""
        worker = self.plane.workers.get(worker_id)
        now = self.clock.now()
        entry = FinishedRequest(
            request_idx=request_idx,
            success=status in ("Success", "Cancelled"),
            status=status,
            entered_queue_at=now - seconds,
            work_started_at=0.0 if status == "Rejected" else now - seconds,
            work_completed_at=now if status == "Success" else 0.0,
        )
        self.plane.reports.finished(FinishedRequests(worker_id=worker_id, mtoken=worker.mtoken, requests=(entry,)))

    def ask(self, request_idx: int = 0, **fields):
        """A request at the desk: `Placed` or `Waits`."""
        given = {"scope": "key:a", "max_queue_time": self.endpoint.max_queue_time, **fields}
        return self.plane.desk.take(TakeRequest(endpoint_id=1, endpoint_name="comfy", request_idx=request_idx, **given))

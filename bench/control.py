"""Durable jobs at scale: submit, lease and restart with 100,000 jobs waiting. A real process over real HTTP.

On a machine that does other things too, the server's CPU time per submit says what the rate would be: 0.5 ms are 2,000
a second on a core.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from bench._http_load import drive
from bench._processor import cpu_s
from bench.figure import Figure
from comfyfleet.control.jobs import Lease
from comfyfleet.control.store.store import open_sqlite

WAITING = 100_000
CALLERS = 64
SUBMIT_FOR_S = 6.0
LEASES = 500
GRAPH = {
    str(n): {"class_type": "KSampler", "inputs": {"steps": 20, "cfg": 7.5, "note": "x" * 150, "model": [str(n - 1), 0]}}
    for n in range(2, 9)
} | {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}}}


def figures() -> list[Figure]:
    """About a minute on two cores; the client shares them with the server."""
    with tempfile.TemporaryDirectory(prefix="cf-bench-") as folder:
        return _measure(Path(folder))


def _measure(folder: Path) -> list[Figure]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        listener.set_inheritable(True)
        port = listener.getsockname()[1]
        base = f"http://127.0.0.1:{port}"
        process, _ = _start(folder, listener, base)
        try:
            key = (folder / "admin.key").read_text().strip()
            _call(base, key, "/api/v0/endptjobs/", {"endpoint_name": "bench", "cold_workers": 0})
            _fill(base, key, WAITING)
            submitted, p99_ms, cpu_ms = _submit(process, port, key)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, ready_s = _start(folder, listener, base)
            process.terminate()
            process.wait()
            lease_ms, bare_lease_ms = asyncio.run(_lease(folder))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [
        Figure(
            name="durable submits at 64 callers, 100,000 waiting",
            value=submitted,
            unit="jobs/s",
            goal=2000,
            better="higher",
            baseline=_bare_commits(folder),
        ),
        Figure(name="durable submit, the server's CPU", value=cpu_ms, unit="ms", goal=0.5, better="lower"),
        Figure(name="durable submit p99", value=p99_ms, unit="ms", goal=None, better="lower"),
        Figure(
            name="lease p99, 100,000 waiting",
            value=lease_ms,
            unit="ms",
            goal=5,
            better="lower",
            baseline=bare_lease_ms,
        ),
        Figure(name="restart with 100,000 jobs", value=ready_s, unit="s", goal=3, better="lower"),
    ]


def _start(folder: Path, listener: socket.socket, base: str) -> tuple[subprocess.Popen[bytes], float]:
    """(the process, seconds until it answered a call that reads the store)."""
    began = time.perf_counter()
    with (folder / "control.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "comfyfleet", "control", "--fd", str(listener.fileno())),
                *("--data-dir", str(folder), "--fleet", "none"),
            ],
            pass_fds=(listener.fileno(),),
            stdout=log,
            stderr=log,
            env={**os.environ, "COMFYFLEET_LOG_LEVEL": "warning"},
        )
    with urllib.request.urlopen(f"{base}/health", timeout=60) as answer:
        assert answer.status == 200
    key = (folder / "admin.key").read_text().strip()
    _call(base, key, "/v1/jobs?limit=1", None)
    return process, time.perf_counter() - began


def _call(base: str, key: str, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        base + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def _fill(base: str, key: str, count: int) -> None:
    job = {"endpoint": "bench", "input": {"workflow_json": GRAPH}}
    for _ in range(count // 1000):
        _call(base, key, "/v1/jobs/batch", {"jobs": [job] * 1000})


def _submit(process: subprocess.Popen[bytes], port: int, key: str) -> tuple[float, float, float]:
    """(jobs accepted per second, p99 in ms, ms of the server's CPU per job) with callers that wait for each answer."""
    body = json.dumps({"endpoint": "bench", "input": {"workflow_json": GRAPH}}).encode()
    message = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    server = psutil.Process(process.pid)
    before_s = cpu_s(server)
    rate, latencies = drive(port, lambda _: message, connections=CALLERS, seconds=SUBMIT_FOR_S, status=b"202")
    used_s = cpu_s(server) - before_s
    return rate, sorted(latencies)[int(len(latencies) * 0.99)] * 1000, used_s * 1000 / len(latencies)


async def _lease(folder: Path) -> tuple[float, float]:
    """p99 in ms of finding the next job and leasing it, durably, as the dispatcher does; and of a bare commit between.

    The bare one is a row inserted into another file: what the disk takes at that moment.
    """
    store = open_sqlite(folder / "control.sqlite3")
    raw = sqlite3.connect(folder / "bare-lease.sqlite3", isolation_level=None)
    raw.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE job (id INTEGER, body TEXT)")
    took, bare = [], []
    for number in range(LEASES):
        began = time.perf_counter()
        head = await store.head(1, "admin", 1e12)
        assert head is not None
        lease = Lease(
            job_id=head.id,
            token=str(number),
            leased_at=0.0,
            expires_at=1e12,
            worker_id=1,
            worker_url="http://127.0.0.1",
            request_idx=number,
        )
        assert await store.lease(lease) is not None
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
        raw.execute("INSERT INTO job VALUES (?, ?)", (number, "x" * 2000))
        bare.append(time.perf_counter() - began)
    raw.close()
    await store.close()
    return sorted(took)[int(LEASES * 0.99)] * 1000, sorted(bare)[int(LEASES * 0.99)] * 1000


def _bare_commits(folder: Path) -> float:
    """Inserts per second of a bare SQLite loop that makes each one durable before the next."""
    raw = sqlite3.connect(folder / "bare.sqlite3", isolation_level=None)
    raw.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE job (id INTEGER, body TEXT)")
    body, count, began = "x" * 2000, 0, time.perf_counter()
    while time.perf_counter() - began < 2.0:
        raw.execute("INSERT INTO job VALUES (?, ?)", (count, body))
        count += 1
    raw.close()
    return count / (time.perf_counter() - began)

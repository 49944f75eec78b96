"""The whole system on this machine: start-up, the documents' two requests at full size, memory of each process."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.figure import Figure
from comfyfleet import SyncServerless
from comfyfleet.cli.demo import ENDPOINT_NAME, REQUESTS, payload
from comfyfleet.cli.up_installation import owned_processes

READY_LIMIT_S = 180.0
ROLES = ("up", "control", "worker", "engine", "render")


def figures() -> list[Figure]:
    """Needs about two minutes on two cores."""
    measured = [_help_time()]
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        began = time.perf_counter()
        system = subprocess.Popen(
            [sys.executable, "-m", "comfyfleet", "up", "--data-dir", str(data_dir), "--port", "0", "--no-link"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            _wait_for_line(system, "ready")
            measured.append(_lower("up to first ready worker", time.perf_counter() - began, "s", goal=25.0))
            measured.extend(_request_times(data_dir))
            measured.extend(_peak_memory(data_dir, system.pid))
        finally:
            system.send_signal(signal.SIGINT)
            system.wait(timeout=60)
    return measured


def _lower(name: str, value: float, unit: str, *, goal: float | None = None, baseline: float | None = None) -> Figure:
    return Figure(name=name, value=value, unit=unit, goal=goal, better="lower", baseline=baseline)


def _help_time() -> Figure:
    def median_s(command: list[str]) -> float:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    bare = median_s([sys.executable, "-c", "pass"])
    ours = median_s([sys.executable, "-m", "comfyfleet", "--help"])
    return _lower("comfyfleet --help", ours, "s", goal=0.4, baseline=bare)


def _wait_for_line(system: subprocess.Popen[str], wanted: str) -> None:
    assert system.stdout is not None
    deadline = time.monotonic() + READY_LIMIT_S
    for line in system.stdout:
        if line.strip() == wanted:
            return
        if time.monotonic() > deadline:
            break
    raise RuntimeError(f"comfyfleet up never said {wanted!r}")


def _request_times(data_dir: Path) -> list[Figure]:
    text = (data_dir / "client.toml").read_text(encoding="utf-8")
    found = dict(re.findall(r'^(\w+) = "(.*)"$', text, re.MULTILINE))
    goals = {"ace_step_v1_t2m.json": 35.0, "wan22_t2v_a14b.json": 60.0}
    measured = []
    with SyncServerless(found["api_key"], url=found["url"]) as client:
        endpoint = client.get_endpoint(ENDPOINT_NAME)
        for request in REQUESTS:
            began = time.perf_counter()
            outcome = endpoint.request("/generate/sync", payload(request))
            if not outcome["ok"]:
                raise RuntimeError(f"{request.file}: HTTP {outcome['status']} {outcome['text'][:300]}")
            measured.append(_lower(request.title, time.perf_counter() - began, "s", goal=goals[request.file]))
    return measured


def _peak_memory(data_dir: Path, up_pid: int) -> list[Figure]:
    """VmHWM: the most resident memory each process ever had, by the kernel's account."""
    peaks: dict[str, float] = {}
    for process in [psutil.Process(up_pid), *owned_processes(data_dir)]:
        words = process.cmdline()
        named = [word.rpartition(".")[2] for word in words]  # "comfyfleet.engine.render" is the render child
        role = next((word for word in named if word in ROLES), None) or os.path.basename(words[0] if words else "?")
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        peak_mb = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024  # type: ignore[union-attr]
        peaks[role] = max(peak_mb, peaks.get(role, 0.0))
    return [_lower(f"peak memory of {role}", peak_mb, "MB") for role, peak_mb in sorted(peaks.items())]

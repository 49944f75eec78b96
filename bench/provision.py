"""The downloader against curl on the same throttled server, its memory, and the time from `worker` to Ready."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from bench.figure import Figure

SIZE_BYTES = 768 * 2**20
RATE_BYTES_S = 200e6
_BLOCK = 256 * 1024
_SOURCE = str(Path(__file__).resolve().parents[1] / "src")
_DOWNLOAD = """
import resource, sys, aiohttp, anyio
from pathlib import Path
from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.provision.download import Downloader
from comfyfleet.provision.progress import FileProgress
from comfyfleet.provision.provisioner import READ_BUFFER_BYTES
from comfyfleet.provision.template import ModelFile
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.settings.provision import SourceSettings
async def main():
    clock = SystemClock()
    async with aiohttp.ClientSession(auto_decompress=False, read_bufsize=READ_BUFFER_BYTES) as session:
        downloader = Downloader(SourceSettings(), session=session, clock=clock, ids=SystemIds(),
                                limits=TransferLimits(reserve_bytes=0))
        model = ModelFile(url=sys.argv[1], folder="checkpoints", name="m.ckpt")
        began = clock.monotonic()
        await downloader.fetch(model, Path(sys.argv[2]), FileProgress(name="m"))
        print(clock.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
anyio.run(main, backend_options={"use_uvloop": True})
"""


class _Throttled:
    """Serves one file of random blocks by ranges, RATE_BYTES_S over all connections."""

    def __init__(self) -> None:
        self._block = os.urandom(_BLOCK)
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/model"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            pending = b""
            while True:
                while b"\r\n\r\n" not in pending:
                    more = connection.recv(65536)
                    if not more:
                        return
                    pending += more
                head, _, pending = pending.partition(b"\r\n\r\n")
                start, end, status = 0, SIZE_BYTES, "200 OK"
                for line in head.decode().lower().split("\r\n"):
                    if line.startswith("range: bytes="):
                        first, _, last = line.removeprefix("range: bytes=").partition("-")
                        start, end = int(first), min(int(last) + 1 if last else SIZE_BYTES, SIZE_BYTES)
                        status = "206 Partial Content"
                answer = f'HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\nETag: "v1"\r\n'
                if status.startswith("206"):
                    answer += f"Content-Range: bytes {start}-{end - 1}/{SIZE_BYTES}\r\n"
                connection.sendall(f"{answer}\r\n".encode())
                self._body(connection, end - start)

    def _body(self, connection: socket.socket, left: int) -> None:
        while left:
            block = self._block[: min(left, _BLOCK)]
            with self._lock:
                now = time.perf_counter()
                self._free_at = max(self._free_at, now - 0.02) + len(block) / RATE_BYTES_S
                wait = self._free_at - now
            if wait > 0:
                time.sleep(wait)
            connection.sendall(block)
            left -= len(block)


def _downloads() -> list[Figure]:
    folder = Path(tempfile.mkdtemp(prefix="bench-provision-"))
    server = _Throttled()
    try:
        began = time.perf_counter()
        subprocess.run(["curl", "-sS", "-o", str(folder / "curl"), server.url], check=True)
        curl_s = time.perf_counter() - began
        (folder / "curl").unlink()
        done = subprocess.run(
            [sys.executable, "-c", _DOWNLOAD, server.url, str(folder)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": _SOURCE},
        )
        seconds, peak_kib = done.stdout.split()[-2:]
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)
    return [
        Figure(
            name="download, digests included, against curl",
            value=round(curl_s / float(seconds), 3),
            unit="of curl's throughput",
            goal=0.9,
            better="higher",
            baseline=round(SIZE_BYTES / curl_s / 1e6, 1),
        ),
        Figure(
            name="download, peak memory of the process",
            value=round(int(peak_kib) * 1024 / 1e6, 1),
            unit="MB",
            goal=100.0,
            better="lower",
        ),
    ]


def _worker_to_ready() -> list[Figure]:
    """`comfyfleet worker` under a control plane's stub, twice: the second time its score and miniatures are there."""
    folder = Path(tempfile.mkdtemp(prefix="bench-ready-"))
    try:
        cold, warm = _one_start(folder), _one_start(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        Figure(
            name="worker to Ready, miniatures and score cached",
            value=round(warm, 1),
            unit="s",
            goal=12.0,
            better="lower",
            baseline=round(cold, 1),
        )
    ]


def _one_start(folder: Path) -> float:
    ports = []
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    for probe in probes:
        ports.append(probe.getsockname()[1])
        probe.close()
    control, agent, wrapper, engine = ports
    shared = {**os.environ, "PYTHONPATH": _SOURCE, "COMFYFLEET_DATA_DIR": str(folder)}
    plane = subprocess.Popen(
        [
            *(sys.executable, "-m", "comfyfleet", "control", "--port", str(control)),
            *("--data-dir", str(folder / "control"), "--fleet", "none"),
        ],
        env=shared,
        stderr=subprocess.DEVNULL,
    )
    try:
        _until(f"http://127.0.0.1:{control}/health", 60)
        began = time.perf_counter()
        worker = subprocess.Popen(
            [sys.executable, "-m", "comfyfleet", "worker", "--port", str(wrapper), "--engine-port", str(engine)],
            env={
                **shared,
                "REPORT_ADDR": f"http://127.0.0.1:{control}",
                "CONTAINER_ID": "1",
                "MASTER_TOKEN": "bench",
                "WORKER_PORT": str(agent),
                f"VAST_TCP_PORT_{agent}": str(agent),
                "COMFYFLEET_WORKER_DIR": str(folder / "worker"),
                "COMFYFLEET_TEMPLATE": "local",
            },
            stderr=subprocess.DEVNULL,
        )
        try:
            _until_loaded(f"http://127.0.0.1:{wrapper}/metrics", 240)
            return time.perf_counter() - began
        finally:
            worker.terminate()
            worker.wait(30)
    finally:
        plane.terminate()
        plane.wait(30)


def _until(url: str, limit_s: float) -> str:
    until = time.perf_counter() + limit_s
    while time.perf_counter() < until:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    raise RuntimeError(f"no answer from {url}")


def _until_loaded(url: str, limit_s: float) -> None:
    until = time.perf_counter() + limit_s
    while time.perf_counter() < until:
        text = _until(url, limit_s)
        if any(
            line.startswith("comfyfleet_load_seconds ") and float(line.split()[1]) > 0 for line in text.splitlines()
        ):
            return
        time.sleep(0.1)
    raise RuntimeError("the worker did not become Ready")


def figures() -> list[Figure]:
    return [*_downloads(), *_worker_to_ready()]


if __name__ == "__main__":
    print(json.dumps([figure.as_dict() for figure in figures()], indent=1))

"""A fake engine and a worker as real processes, for stories and measurements: start, ask, kill, start again.

Nothing here waits by the clock alone: readiness is asked for, and a process that ended early raises with its log.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.to_thread

Graph = dict[str, dict[str, Any]]
READY_TIMEOUT_S = 120.0


# Below what systems hand out for port 0 and for calls going out (32768 on Linux), above our own default ports: what is
# chosen here stays free until the process it is meant for has started. Each process of a test run has its own stretch.
_STRETCH = 200
_PORTS = itertools.cycle(range(_STRETCH))
_FIRST_PORT = 20_000 + os.getpid() % 60 * _STRETCH


def free_port() -> int:
    """A free port that nobody is given by chance, and that this process chooses once in 200 calls."""
    for _ in range(_STRETCH):
        port = _FIRST_PORT + next(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port is left")


def picture(color: int, *, prefix: str = "picture", seconds: float = 0.0, fault: str = "", gate: str = "") -> Graph:
    """The trivial graph; before the save come a silent wait of `seconds`, a `gate` to be opened, a FakeFault."""
    graph: Graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}}
    }
    last = "1"
    if seconds:
        graph["2"] = {"class_type": "FakeSleep", "inputs": {"images": [last, 0], "seconds": seconds}}
        last = "2"
    if gate:
        graph["5"] = {"class_type": "FakeGate", "inputs": {"images": [last, 0], "gate": gate}}
        last = "5"
    if fault:
        graph["3"] = {"class_type": "FakeFault", "inputs": {"images": [last, 0], "fault": fault}}
        last = "3"
    graph["9"] = {"class_type": "SaveImage", "inputs": {"images": [last, 0], "filename_prefix": prefix}}
    return graph


@dataclass(kw_only=True)
class Running:
    """One process of ours, in a group of its own."""

    command: list[str]
    env: Mapping[str, str]
    log_path: Path
    base_url: str
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=dict(self.env), stdout=log, stderr=log, start_new_session=True
            )

    @property
    def pid(self) -> int:
        if self.process is None:
            raise RuntimeError("not started")
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    async def until(self, path: str) -> None:
        """Wait for a 200 on `path`. Raises with the log when the process ends first, or TimeoutError."""
        async with aiohttp.ClientSession() as session:
            with anyio.fail_after(READY_TIMEOUT_S):
                while True:
                    if self.process is not None and self.process.poll() is not None:
                        raise RuntimeError(f"ended early:\n{self.log()[-4000:]}")
                    try:
                        async with session.get(self.base_url + path) as answer:
                            if answer.status == 200:
                                return
                    except (aiohttp.ClientError, OSError):
                        pass
                    await anyio.sleep(0.02)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


@dataclass(kw_only=True)
class FakeEngineProcess(Running):
    """A fake engine on its own, as a foreign backend."""

    folder: Path

    @property
    def ledger(self) -> list[str]:
        """`start <id>` and `done <id>`, in order, over all lives of the process."""
        path = self.folder / "ledger"
        return path.read_text().splitlines() if path.exists() else []


@dataclass(kw_only=True)
class WorkerProcess(Running):
    """A standalone worker. `post` and `get` are what a caller does."""

    folder: Path
    engine_url: str
    session: aiohttp.ClientSession | None = field(default=None, repr=False)

    async def generate(self, workflow: Any, path: str = "/generate/sync", **fields: Any) -> tuple[int, dict[str, Any]]:
        return await self.post(path, {"input": {"workflow_json": workflow, **fields}})

    async def post(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        async with self._http().post(self.base_url + path, json=body) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        async with self._http().get(self.base_url + path) as answer:
            return answer.status, await answer.json()

    async def result(self, job_id: str) -> tuple[int, dict[str, Any]]:
        """The result, waited for by the job's own event stream."""
        headers = {"Accept": "text/event-stream"}
        async with self._http().get(f"{self.base_url}/result/{job_id}", headers=headers) as answer:
            await answer.read()
        return await self.get(f"/result/{job_id}")

    async def settled(self, job_id: str) -> tuple[int, dict[str, Any]]:
        """The result, asked for now and then: unlike following it, this does not count as a caller."""
        while True:
            status, answer = await self.get(f"/result/{job_id}")
            if status != 202:
                return status, answer
            await anyio.sleep(0.1)

    async def misbehave(self, **faults: Any) -> None:
        """Ask the fake engine for faults (`POST /fake`)."""
        async with self._http().post(self.engine_url + "/fake", json=faults) as answer:
            answer.raise_for_status()

    def open_gate(self, name: str) -> None:
        """Let the renders go on that wait at this gate."""
        (self.folder / f"gate-{name}").touch()

    async def renders(self) -> dict[str, int]:
        """How often the engine's present process rendered each prompt id, without canaries."""
        async with self._http().get(self.engine_url + "/fake") as answer:
            counts = (await answer.json())["renders"]
        return {name: count for name, count in counts.items() if not name.startswith("canary-")}

    @property
    def ledger(self) -> list[str]:
        path = self.folder / "ledger"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if "canary-" not in line]

    def _http(self) -> aiohttp.ClientSession:
        if self.session is None:
            raise RuntimeError("use `a_worker`")
        return self.session


def fake_engine(folder: Path, *, job_s: float = 0.004, elsewhere: bool = False) -> FakeEngineProcess:
    """A fake engine, not yet started. elsewhere: as on another machine, whose folders nobody here can see."""
    port = free_port()
    return FakeEngineProcess(
        command=[*_fake_command(folder, job_s), *_places(folder, port), *(["--elsewhere"] if elsewhere else [])],
        env=os_environment(),
        log_path=folder / "engine.log",
        base_url=f"http://127.0.0.1:{port}",
        folder=folder,
    )


def standalone_worker(
    folder: Path, *, backends: tuple[str, ...] = (), job_s: float = 0.004, **env: str
) -> WorkerProcess:
    """A standalone worker over a fake engine of its own, or over `backends`; not yet started."""
    port, engine_port = free_port(), free_port()
    settings = {
        "COMFYFLEET_DATA_DIR": str(folder / "data"),
        "COMFYFLEET_WRAPPER_PORT": str(port),
        "COMFYFLEET_ENGINE_PORT": str(engine_port),
        "COMFYFLEET_FILES_URL": f"http://127.0.0.1:{port}",
    }
    if backends:
        settings["COMFYUI_BACKENDS"] = ",".join(backends)
    else:
        settings["COMFYFLEET_ENGINE_COMMAND"] = " ".join(_fake_command(folder, job_s))
    return WorkerProcess(
        command=[sys.executable, "-m", "comfyfleet", "worker", "--standalone"],
        env={**os_environment(), **settings, **env},
        log_path=folder / "worker.log",
        base_url=f"http://127.0.0.1:{port}",
        folder=folder,
        engine_url=backends[0] if backends else f"http://127.0.0.1:{engine_port}",
    )


@asynccontextmanager
async def a_worker(
    folder: Path, *, backends: tuple[str, ...] = (), job_s: float = 0.004, **env: str
) -> AsyncIterator[WorkerProcess]:
    """A ready standalone worker as `standalone_worker` makes it; gone after the block."""
    worker = standalone_worker(folder, backends=backends, job_s=job_s, **env)
    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    async with aiohttp.ClientSession(connector=connector) as session:
        worker.session = session
        try:
            worker.start()
            await worker.until("/health")
            yield worker
        finally:
            worker.stop()


def _fake_command(folder: Path, job_s: float) -> list[str]:
    ledger = folder / "ledger"
    return [sys.executable, "-m", "comfyfleet.testing.fake_engine", "--job-s", str(job_s), "--ledger", str(ledger)]


def _places(folder: Path, port: int) -> list[str]:
    root = folder / "engine"
    places = {name: str(root / name) for name in ("input", "output", "temp")}
    return ["--port", str(port), *(part for name, path in places.items() for part in (f"--{name}-dir", path))]


def os_environment() -> dict[str, str]:
    """What a child of a test needs: the path and where Python finds this package, nothing of the tester's own."""
    kept = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"
    kept["HOME"] = str(Path.home())
    return kept

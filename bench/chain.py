"""The whole chain around an engine that renders nothing: client, control plane, worker and back, against the known one.

Ours: our client, control plane and worker, and an engine that takes no time. Theirs, in the same run and in turns: the
unmodified `vastai` client and worker framework with a stub control plane and a stub model. All are processes of their
own over loopback. The clients are told by their stdin what to do next, so that rounds of both alternate. Of two chains
that are the same, the one that is started first is slower by 2 to 5 % (measured, ours beside ours): so each is started
first for one half of the rounds. Needs the environment that `make setup` makes for `vastai`; without it there is
nothing to hold ours against, and no figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench._fresh_folder import fresh_folder
from bench._processor import cpu_s
from bench.figure import Figure
from comfyfleet.testing.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = int(os.environ.get("COMFYFLEET_BENCH_ROUNDS", "24"))
# callers -> requests of one round
SIZES = {1: 25, 8: 160}
READY_S = 120.0


@dataclass
class Measured:
    """What one kind of chain did, over all its rounds."""

    ms: dict[int, list[float]] = field(default_factory=lambda: {callers: [] for callers in SIZES})
    rates: dict[int, list[float]] = field(default_factory=lambda: {callers: [] for callers in SIZES})
    cpu_s: dict[str, float] = field(default_factory=dict)
    requests: int = 0

    def cpu_ms(self) -> dict[str, float]:
        """CPU per request, by role."""
        return {role: 1000 * seconds / self.requests for role, seconds in self.cpu_s.items()}


@dataclass
class Chain:
    """A client that waits for orders, and the processes whose time is counted, by role."""

    client: subprocess.Popen[str]
    roles: dict[str, psutil.Process]

    def round(self, callers: int, count: int, into: Measured | None = None) -> None:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        before = {role: cpu_s(process) for role, process in self.roles.items()}
        self.client.stdin.write(json.dumps([callers, count]) + "\n")
        self.client.stdin.flush()
        line = self.client.stdout.readline()
        if not line:
            raise RuntimeError("a client of the chain ended; see its stderr above")
        seconds, whole_s = json.loads(line)
        if into is None:
            return
        into.ms[callers] += [one * 1000 for one in seconds]
        into.rates[callers].append(count / whole_s)
        into.requests += count
        for role, process in self.roles.items():
            into.cpu_s[role] = into.cpu_s.get(role, 0.0) + cpu_s(process) - before[role]


def figures() -> list[Figure]:
    """About a minute on two cores."""
    python = os.environ.get("COMFYFLEET_VASTAI_PYTHON") or str(ROOT / ".venv-vastai" / "bin" / "python")
    if not Path(python).exists():
        print("chain: the real vastai client is not installed; `make setup` installs it", file=sys.stderr)
        return []
    ours, theirs = Measured(), Measured()
    kinds: list[tuple[Measured, Callable[[Path], contextlib.AbstractContextManager[Chain]]]] = [
        (ours, _our_chain),
        (theirs, partial(_their_chain, python=python)),
    ]
    for order in (kinds, kinds[::-1]):
        with fresh_folder() as folder, contextlib.ExitStack() as stack:
            chains = [
                (measured, stack.enter_context(start(folder / str(place))))
                for place, (measured, start) in enumerate(order)
            ]
            _in_turns(chains, ROUNDS // 2)
    for name, measured in (("ours", ours), ("theirs", theirs)):
        print(f"chain: CPU ms per request, {name}: {_rounded(measured.cpu_ms())}", file=sys.stderr)
    one, eight = theirs.ms[1], theirs.rates[8]
    cpu, their_cpu = sum(ours.cpu_ms().values()), sum(theirs.cpu_ms().values())
    return [
        _figure("whole chain at one caller, p50", statistics.median(ours.ms[1]), "ms", statistics.median(one), "lower"),
        _figure(
            "whole chain at eight callers",
            statistics.median(ours.rates[8]),
            "jobs/s",
            statistics.median(eight),
            "higher",
        ),
        _figure("whole chain, CPU of all processes per request", cpu, "ms", their_cpu, "lower"),
    ]


def _in_turns(chains: list[tuple[Measured, Chain]], rounds: int) -> None:
    for _, chain in chains:
        for callers in SIZES:
            chain.round(callers, 30)
    for number in range(rounds):
        for callers, count in SIZES.items():
            for measured, chain in chains if number % 2 else chains[::-1]:
                chain.round(callers, count, measured)


def _figure(name: str, value: float, unit: str, baseline: float, better: Any) -> Figure:
    return Figure(name=name, value=value, unit=unit, goal=baseline, better=better, baseline=baseline)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


# --- ours ------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _our_chain(folder: Path) -> Iterator[Chain]:
    folder.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.set_inheritable(True)
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        words = ["--fd", str(listener.fileno()), "--data-dir", str(folder), "--fleet", "local", "--max-workers", "1"]
        engine = f"{sys.executable} {ROOT}/bench/_instant_engine.py"
        with (
            (folder / "log").open("wb") as log,
            _ended(
                [sys.executable, "-m", "comfyfleet", "control", *words],
                env={**os.environ, "COMFYFLEET_ENGINE_COMMAND": engine},
                stdout=log,
                stderr=log,
                pass_fds=(listener.fileno(),),
            ) as control,
        ):
            key = _until(lambda: _told(base, folder))
            endpoint = {"endpoint_name": "chain", "cold_workers": 1, "max_workers": 1, "min_load": 1e9}
            _call(base, key, "/api/v0/endptjobs/", endpoint)
            _call(base, key, "/api/v0/workergroups/", {"endpoint_name": "chain", "template_hash": "local"})
            _until(lambda: _is_ready(base, key))
            (worker,) = psutil.Process(control.pid).children()
            (engine_process,) = worker.children()
            with _ended(
                [sys.executable, "-m", "bench._chain_client", base, key],
                env=dict(os.environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            ) as client:
                roles = {"control": psutil.Process(control.pid), "worker": worker, "engine": engine_process}
                yield Chain(client=client, roles={"client": psutil.Process(client.pid), **roles})


def _told(base: str, folder: Path) -> str:
    """The admin key, once the control plane answers."""
    with urllib.request.urlopen(f"{base}/health", timeout=30):
        return (folder / "admin.key").read_text().strip()


def _is_ready(base: str, key: str) -> bool:
    return any(row["status"] == "idle" for row in _call(base, key, "/v1/workers")["workers"])


# --- theirs ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _their_chain(folder: Path, python: str) -> Iterator[Chain]:
    folder.mkdir(parents=True)
    control_port, model_port, port = free_port(), free_port(), free_port()
    base, url = f"http://127.0.0.1:{control_port}", f"http://127.0.0.1:{port}"
    log = folder / "model.log"
    log.write_text("MODEL READY\n")
    env = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
        "CONTAINER_ID": "42",
        "REPORT_ADDR": base,
        "MASTER_TOKEN": "m",
        "WORKER_PORT": str(port),
        "WORKER_HTTP_PORT": str(free_port()),
        f"VAST_TCP_PORT_{port}": str(port),
        "PUBLIC_IPADDR": "127.0.0.1",
        "USE_SSL": "false",
        "UNSECURED": "false",
    }
    here = str(Path(__file__).parent)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context((folder / "log").open("wb"))

        def run(*words: str, **options: Any) -> subprocess.Popen[str]:
            return stack.enter_context(_ended([*words], stdout=output, stderr=output, **options))

        stub = run(sys.executable, f"{here}/_chain_stubs.py", "control", str(control_port), url)
        model = run(sys.executable, f"{here}/_chain_stubs.py", "model", str(model_port))
        _until(lambda: _opens(f"{base}/pubkey/") and _opens(f"http://127.0.0.1:{model_port}/health"))
        worker = run(python, f"{here}/_chain_vastai.py", "worker", str(model_port), str(log), env=env, cwd=folder)
        _until(lambda: _opens(f"{base}/is_ready"))
        client = stack.enter_context(
            _ended(
                [python, f"{here}/_chain_vastai.py", "client", base],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        running = {"client": client, "control": stub, "worker": worker, "engine": model}
        yield Chain(client=client, roles={role: psutil.Process(process.pid) for role, process in running.items()})


def _opens(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)


# --- both ------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _ended(words: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(words, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _until(holds: Any) -> Any:
    """Its first true value."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if found := holds():
                return found
        time.sleep(0.1)
    raise TimeoutError("the chain did not come up")


def _call(base: str, key: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(base + path, data=data, headers=headers), timeout=30) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    for figure in figures():
        print(figure)

"""The wrapper against the bare engine, in one run: added latency, throughput, the engine's idle gap, memory.

The bare engine is the shipped fake at 4 ms a job. Bare and wrapped calls alternate, so that the machine's noise falls
on both. Bare latency is what the peers were measured against (submit, `executing: null` on the socket, the history
read: only that names the files); what is added over the socket's word alone is told beside it.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec

from bench.figure import Figure
from bench.object_store import slow_store
from comfyfleet.clock import SystemClock
from comfyfleet.testing.processes import WorkerProcess, a_worker, picture

CLOCK = SystemClock()
LATENCY_ROUNDS = 300
CALLERS = 32
JOBS = 640
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class BareEngine:
    """A client that does what any wrapper must, and nothing else. One socket for all."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self._done: dict[str, anyio.Event] = {}

    async def listen(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with self._session.ws_connect(f"{self._url}/ws?clientId=bench", compress=0) as socket:
            async for message in socket:
                if not self._done and message.type is aiohttp.WSMsgType.TEXT:
                    task_status.started() if not hasattr(self, "up") else None
                    self.up = True
                event = _decode(message.data)
                if event["type"] == "executing" and event["data"].get("node") is None:
                    done = self._done.pop(event["data"]["prompt_id"], None)
                    if done is not None:
                        done.set()

    async def job(self, prompt_id: str, graph: dict[str, Any]) -> None:
        """POST /prompt, then the socket until `executing: null`."""
        done = self._done[prompt_id] = anyio.Event()
        body = _encode({"prompt": graph, "prompt_id": prompt_id, "client_id": "bench"})
        async with self._session.post(f"{self._url}/prompt", data=body) as answer:
            await answer.read()
        await done.wait()

    async def history(self, prompt_id: str) -> None:
        """What it made."""
        async with self._session.get(f"{self._url}/history/{prompt_id}") as answer:
            if prompt_id not in _decode(await answer.read()):
                raise RuntimeError("no history after the end")


def graphs(series: str) -> Iterator[dict[str, Any]]:
    """Pictures that no cache knows, in folders of at most 200."""
    for number in itertools.count():
        yield picture(number, prefix=f"{series}{number // 200}/p")


async def _wrapped(worker: WorkerProcess, graph: dict[str, Any]) -> None:
    body = _encode({"input": {"workflow_json": graph}})
    assert worker.session is not None
    async with worker.session.post(
        f"{worker.base_url}/generate/sync", data=body, headers={"Content-Type": "application/json"}
    ) as answer:
        text = await answer.read()
        if answer.status != 200:
            raise RuntimeError(text.decode())


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def _latency(worker: WorkerProcess, bare: BareEngine) -> list[Figure]:
    bare_graphs, wrapped_graphs = graphs("bl"), graphs("wl")
    told_s: list[float] = []
    bare_s: list[float] = []
    wrapped_s: list[float] = []
    for number in range(LATENCY_ROUNDS):
        began = CLOCK.monotonic()
        await bare.job(f"bl{number}", next(bare_graphs))
        told_s.append(CLOCK.monotonic() - began)
        await bare.history(f"bl{number}")
        bare_s.append(CLOCK.monotonic() - began)
        began = CLOCK.monotonic()
        await _wrapped(worker, next(wrapped_graphs))
        wrapped_s.append(CLOCK.monotonic() - began)

    def added(over: str, bases_s: list[float], share: float, goal: float | None) -> Figure:
        base = _quantile(bases_s[20:], share) * 1000
        return Figure(
            name=f"worker: latency added by /generate/sync{over}, p{share * 100:.0f}",
            value=round(_quantile(wrapped_s[20:], share) * 1000 - base, 2),
            unit="ms",
            goal=goal,
            better="lower",
            baseline=round(base, 2),
        )

    return [
        added("", bare_s, 0.5, 3.0),
        added("", bare_s, 0.95, 8.0),
        added(" over the socket's word", told_s, 0.5, None),
    ]


async def _crowd(job: Any, jobs: int) -> float:
    """Jobs per second with CALLERS callers."""
    numbers = iter(range(jobs))

    async def caller() -> None:
        for number in numbers:
            await job(number)

    began = CLOCK.monotonic()
    async with anyio.create_task_group() as callers:
        for _ in range(CALLERS):
            callers.start_soon(caller)
    return jobs / (CLOCK.monotonic() - began)


async def _throughput(worker: WorkerProcess, bare: BareEngine) -> list[Figure]:
    bare_graphs, wrapped_graphs = graphs("bt"), graphs("wt")
    rates: dict[str, list[float]] = {"bare": [], "wrapped": []}
    for turn in range(3):
        rates["bare"].append(
            await _crowd(lambda number, turn=turn: bare.job(f"bt{turn}-{number}", next(bare_graphs)), JOBS)
        )
        rates["wrapped"].append(await _crowd(lambda _number: _wrapped(worker, next(wrapped_graphs)), JOBS))
    base = max(rates["bare"])
    return [
        Figure(
            name=f"worker: throughput at {CALLERS} callers, share of the bare engine's best",
            value=round(statistics.median(rates["wrapped"]) / base, 3),
            unit="",
            goal=0.95,
            better="higher",
            baseline=round(base, 1),
        )
    ]


async def _history(worker: WorkerProcess) -> list[dict[str, Any]]:
    assert worker.session is not None
    async with worker.session.get(f"{worker.engine_url}/history?max_items=200") as answer:
        return list((await answer.json()).values())


async def _gaps(worker: WorkerProcess, series: str, jobs: int) -> list[float]:
    """Milliseconds between one job's success and the next one's start, in the engine's own stamps, under backlog."""
    ids = []
    for number in range(jobs):
        graph = picture(number, prefix=f"{series}/p", seconds=0.05)
        _, answer = await worker.generate(graph, path="/generate", request_id=f"{series}-{number}")
        ids.append(answer["id"])
    for job_id in ids:
        await worker.result(job_id)
    stamps = []
    for entry in await _history(worker):
        if f"{series}/p" in str(entry["prompt"]):
            times = {kind: data["timestamp"] for kind, data in entry["status"]["messages"]}
            stamps.append((times["execution_start"], times["execution_success"]))
    stamps.sort()
    return [after[0] - before[1] for before, after in itertools.pairwise(stamps)]


def _gap_figure(gaps: list[float], when: str) -> Figure:
    return Figure(
        name=f"worker: engine idle between jobs, p50{when}",
        value=round(statistics.median(gaps), 2),
        unit="ms",
        goal=5.0,
        better="lower",
    )


def _rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


async def _memory(worker: WorkerProcess, jobs: int = 10_000) -> list[Figure]:
    wrapped_graphs = graphs("wm")
    await _crowd(lambda _number: _wrapped(worker, next(wrapped_graphs)), 1000)
    after_first = _rss_mb(worker.pid)
    await _crowd(lambda _number: _wrapped(worker, next(wrapped_graphs)), jobs - 1000)
    return [
        Figure(
            name=f"worker: memory grown from job 1,000 to {jobs:,}",
            value=round(_rss_mb(worker.pid) - after_first, 1),
            unit="MB",
            goal=5.0,
            better="lower",
            baseline=round(after_first, 1),
        )
    ]


def _big(files: int, size_bytes: int) -> dict[str, Any]:
    return {
        str(number): {
            "class_type": "FakeBig",
            "inputs": {"size_bytes": size_bytes, "filename_prefix": f"big/{files}-{number}"},
        }
        for number in range(files)
    }


async def _peak_growth_mb(worker: WorkerProcess, graph: dict[str, Any]) -> float:
    """How far the worker's memory rises above its start while one job with big outputs runs and is uploaded."""
    before = peak = _rss_mb(worker.pid)
    async with anyio.create_task_group() as tasks:

        async def look() -> None:
            nonlocal peak
            while True:
                peak = max(peak, _rss_mb(worker.pid))
                await anyio.sleep(0.01)

        tasks.start_soon(look)
        status, answer = await worker.generate(graph)
        tasks.cancel_scope.cancel()
    if status != 200 or any("upload_error" in output for output in answer["output"]):
        raise RuntimeError(str([output.get("upload_error") for output in answer["output"]]))
    return peak - before


async def _with_a_store(folder: Path) -> list[Figure]:
    """The idle gap while each upload takes half a second, and memory while gigabytes are uploaded."""
    found = []
    async with slow_store(0.5) as env, a_worker(folder / "slow", MAX_QUEUE_SIZE="1000", **env) as worker:
        found.append(_gap_figure(await _gaps(worker, "slow", 40), ", each upload 500 ms"))
    async with slow_store(0.0) as env, a_worker(folder / "big", **env) as worker:
        await worker.generate(picture(1))
        for name, graph in (("1 GB", _big(1, 10**9)), ("3 x 300 MB", _big(3, 3 * 10**8))):
            found.append(
                Figure(
                    name=f"worker: memory grown while {name} of outputs are uploaded",
                    value=round(await _peak_growth_mb(worker, graph), 1),
                    unit="MB",
                    goal=64.0,
                    better="lower",
                )
            )
    return found


async def measure() -> list[Figure]:
    """All of this room's figures."""
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        async with a_worker(Path(folder), MAX_QUEUE_SIZE="1000") as worker, anyio.create_task_group() as tasks:
            assert worker.session is not None
            bare = BareEngine(worker.engine_url, worker.session)
            await tasks.start(bare.listen)
            found += await _latency(worker, bare)
            found += await _throughput(worker, bare)
            found.append(_gap_figure(await _gaps(worker, "gap", 60), ""))
            found += await _memory(worker)
            tasks.cancel_scope.cancel()
        found += await _with_a_store(Path(folder))
    return found


def figures() -> list[Figure]:
    """For `python -m bench`."""
    return anyio.run(measure, backend_options={"use_uvloop": True})

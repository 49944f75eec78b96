"""Outputs of a gigabyte: how much memory a worker's stages need to keep, describe and upload them to a real S3 server.

Each case runs in a process of its own (`python -m bench.workerio CASE FOLDER ENDPOINT`), warmed by a small one first;
the figure is the peak of its resident memory over that. The files are real where it matters: a film whose poster is
decoded, a song whose every sample is read for its peaks, and bytes that say nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import anyio
import av
import numpy as np
import psutil

from bench.figure import Figure
from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.settings.outreach import FetchSettings, WebhookSettings
from comfyfleet.settings.storage import S3Settings, StorageSettings
from comfyfleet.testing.s3_server import ACCESS_KEY_ID, BUCKET, SECRET_ACCESS_KEY, s3_server
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.worker.engines.client import HistoryEntry
from comfyfleet.worker.stages.history_files import read_made
from comfyfleet.worker.stages.kit import KitPlaces, open_kit

MB = 1024 * 1024
GOAL_MB = 64.0
# What the seeds' wrapper grew by for three outputs of 300 MB (measured elsewhere, on the same class of machine).
KNOWN_WRAPPER_MB = 1731.0
CASES = {
    "one output of 1 GB": [("bytes", 1024)],
    "three outputs of 300 MB": [("film", 300), ("song", 300), ("bytes", 300)],
}


def figures() -> list[Figure]:
    """About a minute on two cores."""
    measured = []
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "s3") as server:
        for case in CASES:
            command = [sys.executable, "-m", "bench.workerio", case, str(Path(folder) / case), server.endpoint_url]
            answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            measured.append(
                Figure(
                    name=f"memory growth, {case}, kept and uploaded to S3",
                    value=answer["growth_mb"],
                    unit="MB",
                    goal=GOAL_MB,
                    better="lower",
                    baseline=KNOWN_WRAPPER_MB if case.startswith("three") else None,
                )
            )
            measured.append(
                Figure(
                    name=f"longest stall of the event loop, {case}",
                    value=answer["stall_ms"],
                    unit="ms",
                    goal=None,
                    better="lower",
                )
            )
            measured.append(
                Figure(
                    name=f"stored and uploaded, {case}",
                    value=answer["mb_per_s"],
                    unit="MB/s",
                    goal=None,
                    better="higher",
                )
            )
    return measured


def make(kind: str, megabytes: int, path: Path) -> None:
    """A file of about this size: `film` (raw frames), `song` (PCM), or `bytes` (noise)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    if kind == "bytes":
        block = noise.bytes(MB)
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(block)
        return
    if kind == "song":
        samples = noise.integers(-9000, 9000, size=(1, 2 * 44100), dtype=np.int16)
        with av.open(str(path), "w") as container:
            audio = container.add_stream("pcm_s16le", rate=44100, layout="stereo")
            for second in range(megabytes * MB // samples.nbytes):
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
                frame.sample_rate, frame.pts = 44100, second * 44100
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
        return
    with av.open(str(path), "w") as container:
        video = container.add_stream("rawvideo", rate=24)
        video.width, video.height, video.pix_fmt = 1920, 1080, "yuv420p"
        picture = noise.integers(0, 255, size=(1080 * 3 // 2, 1920), dtype=np.uint8)
        for _ in range(megabytes * MB // picture.nbytes):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(video.encode())


SUFFIXES = {"film": ".avi", "song": ".wav", "bytes": ".bin"}


class PeakMemory:
    """The largest resident memory of this process while the block runs, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self.before = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss)

    @property
    def growth_mb(self) -> float:
        return (self.peak - self.before) / MB


async def measure(case: str, folder: Path, endpoint_url: str) -> dict[str, float]:
    """Store the case's files as one job would; the first, small job only warms up."""
    s3 = S3Settings(
        bucket=BUCKET,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        endpoint_url=endpoint_url,
    )
    places = KitPlaces(
        output=folder / "kept",
        engine_input=folder / "input",
        outbox=folder / "hooks.sqlite3",
        uploads=folder / "uploads.sqlite3",
        key=b"k" * 32,
    )
    settings = (StorageSettings(s3=s3), WebhookSettings(), FetchSettings())
    stall_ms = 0.0

    async def watch_loop() -> None:
        nonlocal stall_ms
        while True:
            began = time.perf_counter()
            await anyio.sleep(0.005)
            stall_ms = max(stall_ms, (time.perf_counter() - began - 0.005) * 1000)

    async with open_kit(places, *settings, clock=SystemClock(), ids=SystemIds()) as kit:

        async def job(name: str, files: list[tuple[str, int]]) -> int:
            total = 0
            named = []
            for index, (kind, megabytes) in enumerate(files):
                filename = f"{kind}-{index}{SUFFIXES[kind]}"
                make(kind, megabytes, folder / "engine" / name / filename)
                total += (folder / "engine" / name / filename).stat().st_size
                named.append({"filename": filename, "subfolder": name, "type": "output"})
            with PeakMemory() as memory:
                began = time.perf_counter()
                outputs = await kit.store_outputs.run(
                    read_made(HistoryEntry(outputs={"1": {"files": named}}, prompt=[1, "p", {}, {}, []])),
                    request_id=name,
                    request=GenerateInput(),
                    folders={"output": folder / "engine"},
                )
                took_s = time.perf_counter() - began
            for output in outputs:
                if output.error or output.upload_error:
                    raise RuntimeError(f"{output.filename}: {output.error or output.upload_error}")
            figures.update(growth_mb=memory.growth_mb, mb_per_s=total / MB / took_s)
            return total

        figures: dict[str, float] = {}
        await job("warm", [("film", 8), ("song", 8), ("bytes", 20)])
        async with anyio.create_task_group() as watching:
            stall_ms = 0.0
            watching.start_soon(watch_loop)
            await job("real", CASES[case])
            watching.cancel_scope.cancel()
    return {**figures, "stall_ms": stall_ms}


if __name__ == "__main__":
    import structlog

    structlog.configure(logger_factory=structlog.WriteLoggerFactory(sys.stderr))
    print(json.dumps(anyio.run(measure, sys.argv[1], Path(sys.argv[2]), sys.argv[3])))

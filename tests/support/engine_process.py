"""An engine as its own process, and a client that behaves as ComfyUI's own websocket example does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import anyio

from comfyfleet.testing.processes import free_port

START_LIMIT_S = 180
WAIT_S = 60


@dataclass
class RunningEngine:
    """A server to talk to. `folder` holds its input, output and temp folders."""

    kind: str
    port: int
    folder: Path
    process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def input(self) -> Path:
        return self.folder / "input"

    def render_process(self) -> int:
        """The pid of the embedded engine's render process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


@contextmanager
def embedded_engine(
    folder: Path, *, models: Path | None = None, miniatures: Path | None = None
) -> Iterator[RunningEngine]:
    """`comfyfleet engine`, ready; ended with SIGTERM."""
    port = free_port()
    options = {
        "port": port,
        "models-dir": models or folder / "models",
        "miniatures-dir": miniatures or folder / "miniatures",
        "input-dir": folder / "input",
        "output-dir": folder / "output",
        "temp-dir": folder / "temp",
    }
    command = [sys.executable, "-m", "comfyfleet", "engine"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=environment)
        try:
            wait_until_ready(process, port, folder / "engine.log")
            yield RunningEngine(kind="embedded", port=port, folder=folder, process=process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)


@contextmanager
def faked_engine(folder: Path) -> Iterator[RunningEngine]:
    """`comfyfleet.testing.fake_engine`, ready; ended with SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "comfyfleet.testing.fake_engine", "--port", str(port)]
    for kind in ("input", "output", "temp"):
        command += [f"--{kind}-dir", str(folder / kind)]
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            wait_until_ready(process, port, folder / "engine.log")
            yield RunningEngine(kind="fake", port=port, folder=folder, process=process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)


def wait_until_ready(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"the engine did not start: {log.read_text()[-3000:]}")


class Talk:
    """One client: HTTP and, after `listen`, a socket whose messages are kept."""

    def __init__(self, engine: RunningEngine, session: aiohttp.ClientSession, client_id: str) -> None:
        self.engine = engine
        self.http = session
        self.client_id = client_id
        self.socket: aiohttp.ClientWebSocketResponse | None = None
        self.messages: list[dict] = []
        self.binaries: list[bytes] = []

    async def listen(self, features: dict | None = None) -> Talk:
        """Connect and take the greeting."""
        self.socket = await self.http.ws_connect(f"{self.engine.url}/ws?clientId={self.client_id}", max_msg_size=0)
        if features is not None:
            await self.socket.send_json({"type": "feature_flags", "data": features})
        self.greeting = await self.next_message()
        return self

    async def next_message(self) -> dict:
        """The next JSON message; pictures on the way are kept apart."""
        with anyio.fail_after(WAIT_S):
            while True:
                received = await self.socket.receive()
                if received.type == aiohttp.WSMsgType.BINARY:
                    self.binaries.append(received.data)
                    self.messages.append({"type": "binary"})
                    continue
                assert received.type == aiohttp.WSMsgType.TEXT, received
                message = json.loads(received.data)
                self.messages.append(message)
                return message

    async def until(self, kind: str, **facts) -> dict:
        """Read on until a message of this type whose data holds these facts."""
        while True:
            message = await self.next_message()
            if message["type"] == kind and all(message["data"].get(name) == value for name, value in facts.items()):
                return message["data"]

    async def finish(self, prompt_id: str) -> dict:
        """Read until the prompt ended; its history entry."""
        await self.until("executing", node=None, prompt_id=prompt_id)
        return await self.entry(prompt_id)

    async def entry(self, prompt_id: str) -> dict:
        """Its history entry, waited for: history is stored a moment after the last event."""
        with anyio.fail_after(WAIT_S):
            while True:
                found = (await self.get(f"/history/{prompt_id}"))[1]
                if prompt_id in found:
                    return found[prompt_id]
                await anyio.sleep(0.02)

    async def submit(self, prompt: dict, **fields) -> tuple[int, dict]:
        return await self.post("/prompt", {"prompt": prompt, "client_id": self.client_id, **fields})

    async def run(self, prompt: dict, **fields) -> dict:
        """Submit, listen to the end; the history entry."""
        status, answer = await self.submit(prompt, **fields)
        assert status == 200, answer
        return await self.finish(answer["prompt_id"])

    async def post(self, path: str, body=None, **options) -> tuple[int, dict]:
        if body is not None and not isinstance(body, bytes):
            options["json"] = body
        elif body is not None:
            options["data"] = body
        async with self.http.post(self.engine.url + path, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text

    async def get(self, path: str, **options) -> tuple[int, dict]:
        async with self.http.get(self.engine.url + path, **options) as response:
            return response.status, await response.json()

    def told(self, *kinds: str) -> list[str]:
        """The types of what was told so far, in short; `kinds` leaves only those."""
        return [message["type"] for message in self.messages if not kinds or message["type"] in kinds]

    def forget(self) -> None:
        self.messages.clear()
        self.binaries.clear()


def picture(color: int = 1, prefix: str = "ComfyUI", **size) -> dict:
    """EmptyImage -> SaveImage: the smallest prompt with a file."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color, **size},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def slow_picture(color: int, steps: int = 12, side: int = 1024) -> dict:
    """A chain of scalings, a few tenths of a second each, so that there is time to meddle."""
    graph = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}}}
    source = "1"
    for step in range(steps):
        graph[f"{10 + step}"] = {
            "class_type": "ImageScale",
            "inputs": {
                "image": [source, 0],
                "upscale_method": "bicubic",
                "width": side + step,
                "height": side,
                "crop": "disabled",
            },
        }
        source = f"{10 + step}"
    graph["99"] = {
        "class_type": "ImageScale",
        "inputs": {"image": [source, 0], "upscale_method": "area", "width": 8, "height": 8, "crop": "disabled"},
    }
    graph["100"] = {"class_type": "SaveImage", "inputs": {"images": ["99", 0], "filename_prefix": "slow"}}
    return graph

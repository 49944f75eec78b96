"""The whole system on this machine, as a user starts it: `comfyfleet up` in a folder of its own."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

from comfyfleet.cli.up_installation import owned_processes

READY_LIMIT_S = 240.0


class Machine:
    """A running `comfyfleet up`. `lines` are what it printed so far."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.lines: list[str] = []
        self._printed: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "comfyfleet", "up", "--data-dir", str(data_dir), "--port", "0", "--no-link"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as printed:
            for line in printed:
                self._printed.put(line.rstrip("\n"))
        self._printed.put(None)

    def wait_for(self, wanted: str) -> None:
        """Until a printed line contains `wanted`; fails with everything printed when the process ends before."""
        while True:
            line = self._printed.get(timeout=READY_LIMIT_S)
            if line is None:
                raise AssertionError(f"comfyfleet up ended without saying {wanted!r}:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if wanted in line:
                return

    def wait_ready(self) -> None:
        self.wait_for("ready")

    @property
    def client_file(self) -> dict[str, str]:
        return tomllib.loads((self.data_dir / "client.toml").read_text(encoding="utf-8"))

    @property
    def url(self) -> str:
        return self.client_file["url"]

    @property
    def key(self) -> str:
        return self.client_file["api_key"]

    def processes(self) -> list[psutil.Process]:
        """Everything this machine runs, the `up` process itself left out."""
        return owned_processes(self.data_dir)

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(timeout=120)
        self._reader.join(timeout=10)
        return code


@contextmanager
def a_machine(data_dir: Path) -> Iterator[Machine]:
    machine = Machine(data_dir)
    try:
        yield machine
    finally:
        machine.stop()
        for left in owned_processes(data_dir):
            left.kill()


def document_workflow(name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """A document's workflow, made small: `node_7={"steps": 2}` changes inputs of node 7."""
    text = (resources.files("comfyfleet.cli") / "requests" / name).read_text(encoding="utf-8")
    graph = json.loads(text)
    for node, inputs in changes.items():
        graph[node.removeprefix("node_")]["inputs"].update(inputs)
    return graph


def small_song(**changes: Any) -> dict[str, Any]:
    return document_workflow("ace_step_v1_t2m.json", node_17={"seconds": 2}, node_52={"steps": 4, **changes})


def small_film() -> dict[str, Any]:
    return document_workflow(
        "wan22_t2v_a14b.json",
        node_104={"width": 64, "height": 64, "length": 5},
        node_95={"steps": 4, "start_at_step": 2},
        node_96={"steps": 4, "end_at_step": 2},
    )


def document_payload(graph: Any, **changes: Any) -> dict[str, Any]:
    """The documents' payload, every field of it, empty strings included."""
    empty_s3 = dict.fromkeys(("access_key_id", "secret_access_key", "endpoint_url", "bucket_name", "region"), "")
    webhook = {"url": "", "extra_params": {"user_id": "12345", "project_id": "abc-def"}}
    return {"input": {"request_id": "", "workflow_json": graph, "s3": empty_s3, "webhook": webhook, **changes}}

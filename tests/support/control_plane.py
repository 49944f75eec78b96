"""A real control plane as a process: started, killed, started again on the same socket and data, and always ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ControlPlane:
    """`comfyfleet control` on an inherited socket, as a supervisor runs it."""

    def __init__(
        self, folder: Path, *, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._arguments = list(arguments)
        self._environment = dict(environment or {})
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(2048)
        self._listener.set_inheritable(True)
        self.port = self._listener.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    @property
    def key(self) -> str:
        return (self.folder / "admin.key").read_text().strip()

    @property
    def log(self) -> str:
        return (self.folder / "control.log").read_text()

    def start(self, *, wait: bool = True) -> ControlPlane:
        self.folder.mkdir(parents=True, exist_ok=True)
        source = str(Path(__file__).resolve().parents[2] / "src")
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        with (self.folder / "control.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "comfyfleet", "control", "--fd", str(self._listener.fileno())),
                    *("--data-dir", str(self.folder), *self._arguments),
                ],
                env={**kept, "PYTHONPATH": source, "XDG_CONFIG_HOME": str(self.folder / "config"), **self._environment},
                stdout=log,
                stderr=log,
                pass_fds=(self._listener.fileno(),),
            )
        if wait:
            self.until_healthy()
        return self

    def until_healthy(self, limit_s: float = 120.0) -> None:
        """The socket accepts at once (it is ours); this waits for the first answer."""
        until = time.monotonic() + limit_s
        while True:
            try:
                with urllib.request.urlopen(f"{self.base}/health", timeout=30) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                if self.process is not None and self.process.poll() is not None:
                    raise AssertionError(f"the control plane ended:\n{self.log[-4000:]}") from None
                if time.monotonic() > until:
                    raise AssertionError(f"the control plane does not answer:\n{self.log[-4000:]}") from None
                time.sleep(0.05)

    def kill(self) -> None:
        """kill -9: nothing is said or saved on the way out."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def close(self) -> None:
        self.stop()
        self._listener.close()

    def call(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[int, Any]:
        """(status, parsed JSON body)."""
        request = urllib.request.Request(
            self.base + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                **({"Authorization": f"Bearer {self.key if key is None else key}"} if key != "" else {}),
                "Content-Type": "application/json",
                **headers,
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _parsed(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error.read())


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()

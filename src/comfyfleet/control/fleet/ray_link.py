"""The control plane's end of the gateway process (`ray_gateway`): start it, ask it, start another when it fails.

Blocking, from threads: `ask` raises LinkDown when there is no answer in time. The gateway is started again by whoever
asks next, not more often than every few seconds, and only when somebody listens at the head's address.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, TimeoutError
from pathlib import Path

import msgspec

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import NoCapacity
from comfyfleet.control.fleet.ray_gateway import Hello, Question, Reply
from comfyfleet.wire.errors import NotFound, Unavailable

CONNECT_LIMIT_S = 60.0
RETRY_S = 2.0
PROBE_S = 1.0


class LinkDown(Unavailable):
    """The Ray cluster cannot be asked now; the message says why."""


class RayLink:
    """One gateway process at a time. environment: what it starts with."""

    def __init__(self, hello: Hello, *, log_path: Path, environment: Mapping[str, str], clock: Clock) -> None:
        self._hello = hello
        self._log_path = log_path
        self._environment = dict(environment)
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, Future[Reply]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._failed_at = float("-inf")
        self._why = ""

    def ask(self, question: Question, timeout_s: float) -> msgspec.Raw:
        """The result's JSON. Raises LinkDown, NoCapacity, NotFound."""
        self._connect()
        reply = self._exchange(question, timeout_s)
        if not reply.error:
            return reply.result
        if reply.error == NoCapacity.code:
            raise NoCapacity(reply.message)
        if reply.error == NotFound.code:
            raise NotFound(reply.message)
        raise LinkDown(reply.message)

    def restart(self) -> None:
        """Give this gateway up: it is connected to a cluster that does not answer."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def close(self) -> None:
        self.restart()

    def _connect(self) -> None:
        with self._connecting:
            if self._process is not None and self._process.poll() is None:
                return
            if self._clock.monotonic() - self._failed_at < RETRY_S:
                raise LinkDown(self._why)
            try:
                self._probe()
                self._start()
            except (OSError, LinkDown) as problem:
                self._why = f"the Ray head at {self._hello.address} cannot be reached: {problem}"
                self._failed_at = self._clock.monotonic()
                self.restart()
                raise LinkDown(self._why) from problem

    def _probe(self) -> None:
        """Ray itself would try for half a minute."""
        host, _, port = self._hello.address.rpartition(":")
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()

    def _start(self) -> None:
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "comfyfleet.control.fleet.ray_gateway"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # a Ctrl-C is the control plane's to handle
            )
        assert process.stdin is not None  # noqa: S101 - just asked for
        ready: Future[Reply] = Future()
        with self._lock:
            self._process = process
            self._waiting[0] = ready
        threading.Thread(target=self._read, args=(process,), name="ray gateway", daemon=True).start()
        process.stdin.write(msgspec.json.encode(self._hello) + b"\n")
        process.stdin.flush()
        try:
            reply = ready.result(CONNECT_LIMIT_S)
        except TimeoutError as problem:
            raise LinkDown(f"no connection in {CONNECT_LIMIT_S:.0f} s") from problem
        if reply.error:
            raise LinkDown(reply.message)

    def _exchange(self, question: Question, timeout_s: float) -> Reply:
        answer: Future[Reply] = Future()
        with self._lock:
            process = self._process
            if process is None or process.stdin is None:
                raise LinkDown(self._why or "the connection to Ray was given up")
            self._number += 1
            number = self._number
            self._waiting[number] = answer
            try:
                process.stdin.write(msgspec.json.encode(msgspec.structs.replace(question, number=number)) + b"\n")
                process.stdin.flush()
            except OSError as problem:
                self._waiting.pop(number, None)
                raise LinkDown("the connection to Ray ended") from problem
        try:
            return answer.result(timeout_s)
        except TimeoutError as problem:
            raise LinkDown(f"the Ray cluster gave no answer in {timeout_s:.0f} s") from problem
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Until the gateway's stdout ends; then nobody who waits is left waiting."""
        assert process.stdout is not None  # noqa: S101 - asked for
        for line in process.stdout:
            reply = msgspec.json.decode(line, type=Reply)
            with self._lock:
                waiting = self._waiting.pop(reply.number, None)
            if waiting is not None:
                waiting.set_result(reply)
        with self._lock:
            # A later gateway's questions are not this one's to answer.
            left = list(self._waiting.items()) if self._process in (None, process) else []
            self._waiting = {} if left else self._waiting
        for number, future in left:
            future.set_result(Reply(number=number, error="failed", message="the connection to Ray ended"))
        process.stdout.close()
        if process.stdin is not None:
            process.stdin.close()
        process.wait()

"""Keep the control plane running for `comfyfleet up`, and leave nothing behind.

The supervisor owns the listening socket, so a control plane that dies is replaced without one refused connection. It
is a subreaper: whatever a killed control plane leaves (workers, engines) stays its descendant, is adopted by the next
control plane, and is ended with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.abc
import psutil
import structlog

from comfyfleet.cli.lifeline import LIFELINE_VARIABLE
from comfyfleet.cli.up_installation import end_processes
from comfyfleet.ids import SystemIds
from comfyfleet.listening import bind
from comfyfleet.retry import Backoff
from comfyfleet.wire.errors import FleetError

log = structlog.get_logger()

_PR_SET_CHILD_SUBREAPER = 36
RESTART = Backoff(first_s=0.2, factor=2.0, cap_s=10.0, attempts=8)
HEALTHY_AFTER_S = 30.0
STOP_GRACE_S = 15.0


class ControlPlaneFailed(FleetError):
    """The control plane stopped again and again; its log says why."""

    code, status = "control_plane_failed", 500


def listen(host: str, port: int) -> socket.socket:
    """A listening socket to hand to each control plane in turn. Raises CannotListen."""
    listener = bind(host, port)
    listener.listen(1024)
    listener.set_inheritable(True)
    return listener


def become_subreaper() -> None:
    """Orphaned descendants become our children instead of init's (Linux; elsewhere the owner scan has to do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class ControlPlaneSupervisor:
    """Runs `comfyfleet control` as a child on an inherited socket."""

    def __init__(self, *, arguments: list[str], environment: dict[str, str], log_path: Path) -> None:
        self._arguments = arguments
        self._environment = environment
        self._log_path = log_path
        self.process: anyio.abc.Process | None = None

    async def run(self, listener: socket.socket) -> None:
        """Restart on every exit; gives up after a row of quick ones. Ends only by cancellation or that failure."""
        ids = SystemIds()
        waits = RESTART.delays(ids)
        while True:
            started = anyio.current_time()
            with self._log_path.open("ab") as log_file:
                self.process = await anyio.open_process(
                    [sys.executable, "-m", "comfyfleet", "control", "--fd", str(listener.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    env={**self._environment, LIFELINE_VARIABLE: str(os.getpid())},
                    pass_fds=(listener.fileno(),),
                )
            code = await self.process.wait()
            self._reap_adopted()
            log.warning("control_plane.exited", code=code, log=str(self._log_path))
            if anyio.current_time() - started > HEALTHY_AFTER_S:
                waits = RESTART.delays(ids)
            wait_s = next(waits, None)
            if wait_s is None:
                raise ControlPlaneFailed(f"the control plane keeps stopping (exit code {code}); see {self._log_path}")
            await anyio.sleep(wait_s)

    async def stop(self) -> None:
        """End the control plane, then everything that is still descended from us. Nothing survives this."""
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with anyio.move_on_after(STOP_GRACE_S):
                await process.wait()
        left = psutil.Process().children(recursive=True)
        await anyio.to_thread.run_sync(lambda: end_processes(left, grace_s=5.0))

    @staticmethod
    def _reap_adopted() -> None:
        """Collect adopted children that have ended, so that no zombie keeps a pid."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ChildProcessError):
                if child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)

"""One engine's process: started on a leash, its output read and kept, its threads watched.

The leash is PDEATHSIG, set by `tether` between fork and exec: however this worker ends, its engines end with it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.abc
import structlog
from anyio.streams.text import TextReceiveStream

log = structlog.get_logger()

_LOG_LIMIT_BYTES = 16 * 2**20
_STOP_S = 5.0
# What Python prints when ComfyUI's (or our engine's) one prompt thread ends by an exception.
_THREAD_DEATH = re.compile(r"Exception in thread .*\(.*prompt_worker.*\)|Exception in thread .*prompt[-_ ]?worker")
_ANY_THREAD_DEATH = re.compile(r"^Exception in thread ")


@dataclass(kw_only=True, eq=False)
class EngineProcess:
    """A running child. `worker_died` is set when its log says so; `threads_at_ready` is what a healthy one has."""

    process: anyio.abc.Process
    log_path: Path
    worker_died: anyio.Event = field(default_factory=anyio.Event)
    log_ended: anyio.Event = field(default_factory=anyio.Event)
    thread_died: bool = False
    threads_at_ready: frozenset[int] = frozenset()
    last_lines: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    def threads(self) -> frozenset[int]:
        """Thread ids that the process has now; empty where the system does not tell."""
        try:
            return frozenset(int(name) for name in os.listdir(f"/proc/{self.pid}/task"))
        except OSError:
            return frozenset()

    def cpu_s(self) -> float:
        """Processor seconds used so far by all threads."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def read_log(self) -> None:
        """Copy the child's output to its log file, and look for what only the log tells."""
        if self.process.stdout is None:
            return
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        rest = ""
        with self.log_path.open("a", encoding="utf-8") as file:
            async for text in TextReceiveStream(self.process.stdout, errors="replace"):
                if file.tell() > _LOG_LIMIT_BYTES:
                    file.seek(0)
                    file.truncate()
                file.write(text)
                file.flush()
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    self._look_at(line)
        self.log_ended.set()

    def last_words(self) -> str:
        """The last line that says something; what an engine that cannot start leaves as its reason."""
        return next((line.strip() for line in reversed(self.last_lines) if line.strip()), "")

    async def stop(self) -> None:
        """SIGTERM to the group, then SIGKILL; returns when it is gone."""
        with anyio.CancelScope(shield=True):
            self._signal(signal.SIGTERM)
            with anyio.move_on_after(_STOP_S):
                await self.process.wait()
            self._signal(signal.SIGKILL)
            await self.process.wait()
            await self.process.aclose()

    def _look_at(self, line: str) -> None:
        self.last_lines = [*self.last_lines[-19:], line]
        if _THREAD_DEATH.search(line):
            self.worker_died.set()
        elif _ANY_THREAD_DEATH.search(line):
            self.thread_died = True

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return


async def start(command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log_path: Path) -> EngineProcess:
    """Start `command` on the leash, in a process group of its own, its output piped to us."""
    tether = [sys.executable, "-m", "comfyfleet.worker.engines.tether", str(os.getpid()), *command]
    process = await anyio.open_process(tether, env=dict(env), cwd=cwd, stdin=None, stderr=-2, start_new_session=True)
    return EngineProcess(process=process, log_path=log_path)

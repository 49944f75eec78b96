"""The render process as its server sees it: start it, tell it, hear it, end it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import AsyncIterator

import anyio
import msgspec
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from comfyfleet.engine.render.messages import LENGTH_BYTES, Command, Report, decode_report, frame
from comfyfleet.engine.render.setup import RenderSettings

END_GRACE_S = 2.0
MAX_REPORT_BYTES = 1 << 28


class RenderLost(Exception):
    """The render process ended by itself; `reason` says how, in words for a user."""

    def __init__(self, exit_code: int | None) -> None:
        self.exit_code = exit_code
        if exit_code is not None and exit_code < 0:
            name = signal.Signals(-exit_code).name
            hint = "; most likely the machine ran out of memory" if name == "SIGKILL" else ""
            self.reason = f"the render process was killed by {name}{hint}"
        else:
            self.reason = f"the render process ended unexpectedly with exit code {exit_code}"
        super().__init__(self.reason)


class RenderProcess:
    """One child. Made by `started`; `reports` ends with RenderLost."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None  # noqa: S101 - piped
        assert process.stdout is not None  # noqa: S101 - piped
        self._process = process
        self._stdin = process.stdin
        self._stdout = BufferedByteReceiveStream(process.stdout)
        self._sending = anyio.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def exited(self) -> None:
        """Wait for its end."""
        await self._process.wait()

    async def tell(self, command: Command) -> None:
        """A child that is gone hears nothing; `reports` tells of its end."""
        async with self._sending:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self._stdin.send(frame(command))

    async def reports(self) -> AsyncIterator[Report]:
        try:
            while True:
                head = await self._stdout.receive_exactly(LENGTH_BYTES)
                yield decode_report(await self._stdout.receive_exactly(int.from_bytes(head, "big")))
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError):
            raise RenderLost(await self._process.wait()) from None

    async def end(self) -> None:
        """Close its stdin, which ends it; kill it if it does not heed."""
        with anyio.CancelScope(shield=True):  # a child must not outlive a cancelled owner
            await self._stdin.aclose()
            with anyio.move_on_after(END_GRACE_S):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            await self._process.aclose()


@contextlib.asynccontextmanager
async def started(settings: RenderSettings) -> AsyncIterator[RenderProcess]:
    """A running child, ended on the way out. Its stderr is ours; Ctrl-C does not reach it, the server does."""
    command = [sys.executable, "-m", "comfyfleet.engine.render", msgspec.json.encode(settings).decode()]
    process = await anyio.open_process(command, stderr=None, start_new_session=True)
    child = RenderProcess(process)
    try:
        yield child
    finally:
        await child.end()

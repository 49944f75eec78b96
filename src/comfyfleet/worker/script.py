"""Run the operator's `PROVISIONING_SCRIPT`: from a URL or a file, once per content, its words in the model log.

A script that fails is a worker that is not ready; its last words are the reason. One that succeeded is not run again
on this worker's disk until its content changes, so that a worker that wakes is quick.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog
from anyio.streams.text import TextReceiveStream

from comfyfleet.fetching.fetcher import FetchLimits, GuardedFetcher
from comfyfleet.logs import without_secrets
from comfyfleet.wire.errors import FleetError, ProvisionFailed
from comfyfleet.worker.model_log import ModelLog

log = structlog.get_logger()

_LIMITS = FetchLimits(max_bytes=8 * 2**20, total_s=120.0)


@dataclass(frozen=True, kw_only=True)
class ProvisioningScript:
    """where: URL or path. folder: the worker's own, for the copy and the note of success. env: what the script gets."""

    where: str
    folder: Path
    env: Mapping[str, str]
    fetcher: GuardedFetcher
    model_log: ModelLog

    async def run(self, on_line: Callable[[str], None]) -> None:
        """Raises ProvisionFailed with the exit code and the script's last line."""
        content = await self._content()
        note = self.folder / "provisioning.done"
        digest = hashlib.sha256(content).hexdigest()
        if note.is_file() and note.read_text(encoding="ascii") == digest:
            return
        path = self.folder / "provisioning.sh"
        path.write_bytes(content)
        code, last = await self._execute(path, on_line)
        if code != 0:
            why = f"the provisioning script ended with code {code}" + (f": {last}" if last else "")
            self.model_log.line(f"[ERROR] Provisioning Script failed with exit code {code}")
            raise ProvisionFailed(why, reason="script", exit_code=code)
        note.write_text(digest, encoding="ascii")
        log.info("provisioning_script.finished", sha256=digest)

    async def _content(self) -> bytes:
        if "://" not in self.where:
            try:
                return Path(self.where).expanduser().read_bytes()
            except OSError as problem:
                raise ProvisionFailed(
                    f"PROVISIONING_SCRIPT cannot be read: {problem.strerror}", reason="script"
                ) from problem
        into = io.BytesIO()
        try:
            await self.fetcher.download(self.where, into, limits=_LIMITS)
        except FleetError as problem:
            raise ProvisionFailed(f"PROVISIONING_SCRIPT: {problem.message}", reason="script") from problem
        return into.getvalue()

    def _told(self, line: str) -> str:
        """A line as it may be seen: it goes into the model log here, and as a reason to whoever sees the worker."""
        line = without_secrets(line.strip(), self.env)
        self.model_log.line(line)
        return line

    async def _execute(self, path: Path, on_line: Callable[[str], None]) -> tuple[int, str]:
        """Exit code and last line. Cancelled, it takes the script's whole process group along."""
        process = await anyio.open_process(
            ["bash", str(path)], env=dict(self.env), cwd=self.folder, stderr=-2, start_new_session=True
        )
        last, rest = "", ""
        try:
            if process.stdout is not None:
                async for text in TextReceiveStream(process.stdout, errors="replace"):
                    # A progress bar goes back to the line's beginning, for ever.
                    *lines, rest = (rest + text).replace("\r", "\n").split("\n")
                    for line in lines:
                        last = self._told(line) or last
                        on_line(last)
            return await process.wait(), (self._told(rest) if rest else "") or last
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                await process.aclose()

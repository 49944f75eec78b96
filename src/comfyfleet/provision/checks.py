"""Is a staged file what it should be? Size, header and digest, before it gets its final name.

The header check reads a safetensors file's table of contents: a truncated file, an HTML page or a Git LFS pointer under
a model's name is found without a published digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.to_thread

from comfyfleet.wire.errors import ProvisionFailed

_MAX_HEADER_BYTES = 100 * 2**20
_READ_BYTES = 2**20
_BURST_BYTES = 16 * 2**20  # one trip through a thread; a cancelled download waits no longer than for this


def check_header(path: Path, name: str) -> None:
    """Raises ProvisionFailed when `path`, to be named `name`, is not whole by what its own header says."""
    suffix = Path(name).suffix.lower()
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith((b"<!DOCTYP", b"<!doctyp", b"<html", b"version ")):
            raise ProvisionFailed(f"{name} is a web page or a pointer, not a model", file=name, reason="header")
        if suffix == ".gguf" and not start.startswith(b"GGUF"):
            raise ProvisionFailed(f"{name} is no GGUF file", file=name, reason="header")
        if suffix not in (".safetensors", ".sft"):
            return
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size_bytes - 8, _MAX_HEADER_BYTES):
            raise ProvisionFailed(f"{name} has no safetensors header", file=name, reason="header")
        try:
            table = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
            raise ProvisionFailed(f"{name} has a broken safetensors header", file=name, reason="header") from problem
    if size_bytes != 8 + length + end:
        raise ProvisionFailed(
            f"{name} has {size_bytes} bytes, its header tells of {8 + length + end}", file=name, reason="header"
        )


class RunningDigest:
    """SHA-256 of a file that is still being written: follows the part that is there without a gap."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()
        self._position = 0

    async def follow(
        self, prefix_bytes: Callable[[], int], until_changed: Callable[[], Awaitable[None]], total: int
    ) -> str:
        """The digest, once `total` bytes were there."""
        while self._position < total:
            ready = min(prefix_bytes(), total)
            if ready <= self._position:
                await until_changed()
                continue
            await anyio.to_thread.run_sync(self._feed, min(ready, self._position + _BURST_BYTES))
        return self._digest.hexdigest()

    def _feed(self, until: int) -> None:
        while self._position < until:
            block = os.pread(self._fd, min(_READ_BYTES, until - self._position), self._position)
            if not block:
                raise OSError("the staged file is shorter than its ledger says")
            self._digest.update(block)
            self._position += len(block)

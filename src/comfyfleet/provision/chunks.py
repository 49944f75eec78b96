"""Which chunks of a file are on disk: the ledger beside a staged download. Knows no network.

The staged file has its final length from the start, and chunks land at their own offsets. The ledger's first line says
what is being downloaded; each further line is a number of a chunk that is wholly written, or `sync` after the data was
forced to disk. A process may be killed at any byte: a torn last line counts for nothing. After a power cut (another
boot id) only chunks before the last `sync` count.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec

CHUNK_BYTES = 8 * 2**20
SYNC_EVERY = 32

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What is downloaded. etag: the server's strong validator, "" where it gave none; sha256: as published, or ""."""

    size_bytes: int
    etag: str = ""
    sha256: str = ""

    def continues(self, other: Identity) -> bool:
        """May bytes of `other` be completed with bytes of this? Only when something says that they are the same."""
        if self.size_bytes != other.size_bytes:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return bool(self.etag) and self.etag == other.etag


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    identity: Identity
    chunk_bytes: int
    boot_id: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Bytes [start, end) of the file."""

    number: int
    start: int
    end: int


def chunk_at(number: int, *, size_bytes: int, chunk_bytes: int) -> Chunk:
    start = number * chunk_bytes
    return Chunk(number=number, start=start, end=min(start + chunk_bytes, size_bytes))


class Ledger:
    """Open with `create` or `read`; `close` it. `done` is what the file already has."""

    def __init__(self, path: Path, header: _Header, done: set[int], sync: Callable[[], None]) -> None:
        self.identity = header.identity
        self.chunk_bytes = header.chunk_bytes
        self._path = path
        self._sync = sync
        self._done = done
        self._unsynced = 0
        self._prefix = 0
        self._changed = anyio.Event()
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    @property
    def count(self) -> int:
        """How many chunks the whole file has."""
        return -(-self.identity.size_bytes // self.chunk_bytes)

    @property
    def missing(self) -> list[Chunk]:
        return [
            chunk_at(number, size_bytes=self.identity.size_bytes, chunk_bytes=self.chunk_bytes)
            for number in range(self.count)
            if number not in self._done
        ]

    @property
    def done_bytes(self) -> int:
        return self.identity.size_bytes - sum(chunk.end - chunk.start for chunk in self.missing)

    def prefix_bytes(self) -> int:
        """How many bytes from the file's beginning are there without a gap."""
        while self._prefix in self._done:
            self._prefix += 1
        return min(self._prefix * self.chunk_bytes, self.identity.size_bytes)

    def add(self, chunk: Chunk) -> None:
        """The chunk is wholly written."""
        os.write(self._fd, f"{chunk.number}\n".encode())
        self._done.add(chunk.number)
        self._changed.set()
        self._changed = anyio.Event()
        self._unsynced += 1

    @property
    def wants_sync(self) -> bool:
        return self._unsynced >= SYNC_EVERY

    def sync(self) -> None:
        """Force the data down, then say so. Blocking."""
        self._unsynced = 0
        before = len(self._done)
        self._sync()
        if len(self._done) == before:  # a chunk that came in between may not be on disk yet
            os.write(self._fd, b"sync\n")

    async def until_changed(self) -> None:
        await self._changed.wait()

    def close(self) -> None:
        os.close(self._fd)


def create_ledger(
    path: Path, identity: Identity, *, chunk_bytes: int, sync: Callable[[], None], boot_id: str
) -> Ledger:
    """A new ledger, with nothing done, in place of whatever was there."""
    header = _Header(identity=identity, chunk_bytes=chunk_bytes, boot_id=boot_id)
    staging = path.with_name(path.name + ".new")
    staging.write_bytes(msgspec.json.encode(header) + b"\n")
    staging.replace(path)
    return Ledger(path, header, set(), sync)


def read_ledger(path: Path, *, sync: Callable[[], None], boot_id: str) -> Ledger | None:
    """The ledger of an interrupted download; None when there is none that can be read."""
    try:
        content = path.read_bytes()
        lines = content.split(b"\n")
        header = msgspec.json.decode(lines[0], type=_Header)
    except (OSError, msgspec.MsgspecError):
        return None
    if lines[-1]:  # a torn last line could be read as another number
        os.truncate(path, len(content) - len(lines[-1]))
    entries = lines[1:-1]
    if header.boot_id == boot_id:
        return Ledger(path, header, {int(line) for line in entries if line.isdigit()}, sync)
    synced = max((at for at, line in enumerate(entries) if line == b"sync"), default=0)
    kept = sorted({int(line) for line in entries[:synced] if line.isdigit()})
    fresh = create_ledger(path, header.identity, chunk_bytes=header.chunk_bytes, sync=sync, boot_id=boot_id)
    for number in kept:
        fresh.add(chunk_at(number, size_bytes=header.identity.size_bytes, chunk_bytes=header.chunk_bytes))
    return fresh


def boot_id() -> str:
    """Names this run of the operating system; "" where it has no name."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""

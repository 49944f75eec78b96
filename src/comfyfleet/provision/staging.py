"""The file that a download grows in, beside its final place under a name that no model loader looks at.

`.NAME.part` holds the bytes, `.NAME.part.ledger` says which, `.NAME.part.lock` whose turn it is. Only `finish` gives a
file its final name, after everything is on disk; until then nothing is ever there under that name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread

from comfyfleet.provision.chunks import Identity, Ledger, boot_id, create_ledger, read_ledger
from comfyfleet.provision.progress import size
from comfyfleet.wire.errors import DiskFull, ProvisionFailed

_MOST_BLOCKS = 512  # IOV_MAX is 1024


def part_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def ledger_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.part.ledger")


def lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.part.lock")


def staged_bytes(target: Path) -> int:
    """How much of `target` an interrupted download has on disk."""
    ledger = read_ledger(ledger_path(target), sync=lambda: None, boot_id=boot_id())
    if ledger is None or not part_path(target).exists():
        return 0
    try:
        return ledger.done_bytes
    finally:
        ledger.close()


class Staged:
    """An open staged file. Hold the lock while there is one."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = part_path(target)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.ledger: Ledger | None = read_ledger(ledger_path(target), sync=self._sync, boot_id=boot_id())
        if self.ledger is not None and os.fstat(self.fd).st_size != self.ledger.identity.size_bytes:
            self.forget()  # the ledger speaks of a file that is not this one

    def begin(self, identity: Identity, *, chunk_bytes: int) -> Ledger:
        """An empty file of the final length, and its ledger. Raises DiskFull."""
        self.forget()
        with disk_trouble_told(self.target, identity.size_bytes):
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, identity.size_bytes)
            self.ledger = create_ledger(
                ledger_path(self.target), identity, chunk_bytes=chunk_bytes, sync=self._sync, boot_id=boot_id()
            )
        return self.ledger

    def forget(self) -> None:
        """What is staged is worth nothing."""
        if self.ledger is not None:
            self.ledger.close()
            self.ledger = None
        ledger_path(self.target).unlink(missing_ok=True)

    def empty(self) -> None:
        os.ftruncate(self.fd, 0)

    async def write(self, blocks: list[bytes], offset: int) -> int:
        """All of `blocks`, one behind the other, from `offset` on; how many bytes. Raises DiskFull."""
        return await anyio.to_thread.run_sync(self._write, blocks, offset) if blocks else 0

    def _write(self, blocks: list[bytes], offset: int) -> int:
        total = sum(map(len, blocks))
        with disk_trouble_told(self.target, total):
            count = os.pwritev(self.fd, blocks[:_MOST_BLOCKS], offset)
            if count < total:  # more blocks than one call takes, or the system took a part
                rest = memoryview(b"".join(blocks))[count:]
                while rest:
                    count += (written := os.pwrite(self.fd, rest, offset + count))
                    rest = rest[written:]
        return total

    def finish(self) -> None:
        """Force it to disk, give it its name, force that to disk. Blocking."""
        self._sync()
        os.chmod(self.path, 0o644)
        os.replace(self.path, self.target)
        self.forget()
        folder = os.open(self.target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        os.close(self.fd)

    def _sync(self) -> None:
        os.fdatasync(self.fd)


@asynccontextmanager
async def staged(target: Path) -> AsyncIterator[Staged]:
    file = Staged(target)
    try:
        yield file
    finally:
        file.close()


class disk_trouble_told:  # noqa: N801 - reads as the statement it is
    """`with disk_trouble_told(path, n):` turns "no space left" into DiskFull, all else into ProvisionFailed.

    Around disk work only: a network's OSError is worth another try, a disk's is not.
    """

    def __init__(self, target: Path, needed_bytes: int) -> None:
        self._target = target
        self._needed_bytes = needed_bytes

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(self._target, self._needed_bytes, free_bytes(self._target.parent)) from error
        raise ProvisionFailed(
            f"{self._target.name} cannot be written: {error.strerror or error}", file=self._target.name, reason="disk"
        ) from error


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write on the file system of `folder` or its nearest existing parent."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def disk_full(target: Path, needed_bytes: int, free: int, reserve_bytes: int = 0) -> DiskFull:
    reserved = f", and {size(reserve_bytes)} stay free" if reserve_bytes else ""
    return DiskFull(
        f"{target.name} needs {size(needed_bytes)}, the disk has {size(free)} free{reserved}",
        needed_bytes=needed_bytes,
        free_bytes=free,
        reserve_bytes=reserve_bytes or None,
    )

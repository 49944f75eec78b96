"""Ports and folders of local workers: slot n has 3000 + 10 n, 18288 + 10 n and 18188 + 10 n, or the next free ones.

A worker listens seconds after its ports were chosen. Until then they are claimed, so that two installations on one
machine never choose the same ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

AGENT_BASE, WRAPPER_BASE, ENGINE_BASE = 3000, 18288, 18188
STEP = 10


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A place on this machine. The public framework also listens on `agent + 1`, and an engine beside its port."""

    number: int
    agent: int
    wrapper: int
    engine: int

    @property
    def ports(self) -> frozenset[int]:
        return frozenset({self.agent, self.agent + 1, self.wrapper, self.engine})


def is_free(port: int, *addresses: str) -> bool:
    """Nobody listens on 127.0.0.1:port now, nor on the port of these addresses."""
    for address in ("127.0.0.1", *addresses):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


class PortClaims:
    """Ports claimed by this process, for as long as it lives: a locked file each, in a folder of this user's."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / f"comfyfleet-ports-{os.getuid()}"
        self._locks: dict[int, int] = {}  # port -> file descriptor

    def claim(self, port: int) -> bool:
        """Nobody listens on the port, no other process claimed it, and now it is ours."""
        if not is_free(port):
            return False
        if port in self._locks:
            return True
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / str(port), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            return True  # no place to claim it in: as good as a free port gets
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._locks[port] = descriptor
        return True

    def __del__(self) -> None:
        for descriptor in self._locks.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def find_slot(number: int, taken: Collection[int], is_free: Callable[[int], bool] = is_free) -> Slot:
    """Slot `number` with its ports; a busy port moves to the next free one, never onto `taken` or another slot's."""
    used = set(taken)

    def next_free(port: int, width: int = 1) -> int:
        while any(port + step in used or not is_free(port + step) for step in range(width)):
            port += 1
            if port > 65_000:
                raise OSError("no free port is left on this machine")
        used.update(range(port, port + width))
        return port

    return Slot(
        number=number,
        agent=next_free(AGENT_BASE + STEP * number, width=2),
        wrapper=next_free(WRAPPER_BASE + STEP * number),
        engine=next_free(ENGINE_BASE + STEP * number),
    )

"""The seam: where finished files go and how a stranger may read them. Implementations: `local`, `s3`.

A key is a relative POSIX path, `<request_id>/<sub-folder>/<name>`; `checked_key` is the only way in. Contract, tested
over both: after `put` the whole file is readable under the key or nothing changed; putting a key again replaces it;
a signed URL answers GET with the same bytes until it expires, and any change to it is refused; deleting what is not
there is no error. Nothing here holds a file in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_NO_NAMES = frozenset({"", ".", ".."})


class StorageFailed(Exception):
    """The store refused or could not be reached. The text names no secret and no server path."""


@dataclass(frozen=True, kw_only=True)
class SignedUrl:
    """A link and the moment (epoch s) it stops working, as signed: possibly sooner than asked for."""

    url: str
    expires_at: float


class Storage(Protocol):
    """Put, link, delete."""

    async def put(self, path: Path, key: str, *, media_type: str, sha256: str = "") -> None:
        """Store the local file under `key`; with its digest, one that is there already need not travel again.

        Raises StorageFailed.
        """
        ...

    async def url(self, key: str, *, expires_in_s: float) -> SignedUrl:
        """A link for reading. Does not ask whether the key exists. Raises StorageFailed."""
        ...

    async def delete(self, key: str) -> None:
        """Forget the file. Raises StorageFailed."""
        ...


def checked_key(key: str) -> str:
    """The key itself, if it is a plain relative path. Raises ValueError otherwise."""
    is_plain = _NO_NAMES.isdisjoint(key.split("/")) and "\\" not in key and "\0" not in key
    if not is_plain or len(key.encode()) > 1024:
        raise ValueError(f"not a storage key: {key[:80]!r}")
    return key

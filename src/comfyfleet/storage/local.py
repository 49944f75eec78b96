"""Files in a folder, read through signed links (`serve` answers them).

A file is linked, not copied, where that is safe: a hard link shares its bytes with the engine's own file, so
`place(copy=True)` exists for engines that write the same name again in place. The engine's file is never moved.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from urllib.parse import quote

import anyio.to_thread

from comfyfleet.clock import Clock
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.base import SignedUrl, StorageFailed, checked_key

URL_PREFIX = "/files/"
DRAFTS = ".drafts"  # under the root; no key begins with a dot


class LocalStorage:
    """Keys are paths under `root`; `base_url` is what serves `/files/`: a control plane or a standalone worker."""

    def __init__(self, root: Path, base_url: str, signer: UrlSigner, clock: Clock) -> None:
        self.root = root
        self.drafts = root / DRAFTS
        self._root = str(root)
        self._base_url = base_url.rstrip("/").removesuffix("/files")
        self._signer = signer
        self._clock = clock

    async def put(self, path: Path, key: str, *, media_type: str = "", sha256: str = "") -> None:
        try:
            await anyio.to_thread.run_sync(place, path, self.path(key), False)
        except OSError as problem:
            raise StorageFailed(f"cannot store {key}: {problem.strerror or 'failed'}") from problem

    async def url(self, key: str, *, expires_in_s: float) -> SignedUrl:
        signed = self._signer.query(URL_PREFIX + checked_key(key), expires_in_s)
        return SignedUrl(
            url=f"{self._base_url}{URL_PREFIX}{quote(key)}?{signed}",
            expires_at=float(int(self._clock.now() + expires_in_s)),
        )

    def serves(self, url: str) -> bool:
        """Does this link lead to a file here?"""
        return url.startswith(f"{self._base_url}{URL_PREFIX}")

    async def delete(self, key: str) -> None:
        try:
            await anyio.to_thread.run_sync(_remove, self.path(key), self.root)
        except OSError as problem:
            raise StorageFailed(f"cannot delete {key}: {problem.strerror or 'failed'}") from problem

    def path(self, key: str) -> Path:
        """Where the key's file is."""
        return Path(self.place_of(key))

    def place_of(self, key: str) -> str:
        """The same as text, for a caller in a hurry."""
        return f"{self._root}/{checked_key(key)}"


def place(source: Path, target: Path, copy: bool) -> None:
    """Make `target` hold `source`'s bytes, at once or not at all. Blocking; constant memory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not copy and target.samefile(source):
        return
    draft = target.parent / f".part-{secrets.token_hex(6)}"
    try:
        if copy:
            shutil.copyfile(source, draft)
        else:
            try:
                os.link(source, draft, follow_symlinks=True)
            except OSError:  # another file system, or links not allowed here
                shutil.copyfile(source, draft)
        os.replace(draft, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def _remove(path: Path, root: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    for folder in path.parents:
        if folder == root or not folder.is_relative_to(root):
            return
        try:
            folder.rmdir()
        except OSError:  # not empty, or gone
            return

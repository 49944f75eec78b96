"""Keys at rest: key files that are made once, and secrets sealed with them where they must outlive a restart.

A sealed value is ChaCha20-Poly1305 under a key derived for one purpose, so a value sealed for webhooks cannot be
opened as anything else. Not for signatures (see `signing`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
_NONCE_BYTES = 12


class CannotOpen(Exception):
    """Sealed with another key or for another purpose, or changed since."""


def load_or_create_key(path: Path) -> bytes:
    """The 32 random bytes in `path`, made with mode 0600 at first use; two processes that race agree on one key."""
    try:
        return _read(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".key-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):  # another process was first: then its key is the key
            os.link(draft, path)
    finally:
        os.unlink(draft)
    return _read(path)


def _read(path: Path) -> bytes:
    key = path.read_bytes()
    if len(key) < KEY_BYTES:
        raise ValueError(f"{path} holds no key of at least {KEY_BYTES} bytes")
    return key


class Sealer:
    """Seals and opens small secrets for one purpose."""

    def __init__(self, key: bytes, purpose: str) -> None:
        derived = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=purpose.encode()).derive(key)
        self._cipher = ChaCha20Poly1305(derived)

    def seal(self, plain: bytes) -> bytes:
        """Nonce and ciphertext."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, None)

    def open(self, sealed: bytes) -> bytes:
        """What was sealed. Raises CannotOpen."""

        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError) as problem:
            raise CannotOpen("sealed with another key, for another purpose, or changed") from problem

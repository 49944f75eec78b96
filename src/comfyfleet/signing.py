"""HMAC with an expiry, for links to local files. Not for tickets (see `wire.tickets`) nor webhooks (see `webhooks`).

A signature covers the path and the expiry, so neither can be changed; comparing takes constant time.
"""

from __future__ import annotations

import hmac

from comfyfleet.clock import Clock


class UrlSigner:
    """Signs paths and checks them. `key` is at least 32 random bytes and never leaves the machine."""

    def __init__(self, key: bytes, clock: Clock) -> None:
        self._key = key
        self._clock = clock

    def query(self, path: str, expires_in_s: float) -> str:
        """`expires=<epoch s>&signature=<hex>` for `path`, valid for `expires_in_s` seconds."""
        expires = int(self._clock.now() + expires_in_s)
        return f"expires={expires}&signature={self._digest(path, expires)}"

    def is_valid(self, path: str, expires: str, signature: str) -> bool:
        """True only for a signature made here, over this path and expiry, that has not expired."""
        return self.is_ours(path, expires, signature) and int(expires) >= self._clock.now()

    def is_ours(self, path: str, expires: str, signature: str) -> bool:
        """True for a signature made here over this path and expiry, also when it has expired."""
        if not expires.isascii() or not expires.isdigit() or len(expires) > 12:
            return False
        return hmac.compare_digest(self._digest(path, int(expires)).encode(), signature.encode())

    def _digest(self, path: str, expires: int) -> str:
        message = f"{path}\n{expires}".encode()
        return hmac.digest(self._key, message, "sha256").hex()

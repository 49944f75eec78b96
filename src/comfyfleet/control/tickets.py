"""What lets a caller in at a worker: the compatible `signature`, and beside it our own ticket.

The compatible one is what the public worker framework checks: RSA PKCS#1 v1.5 with SHA-256 over the JSON of
`{"url": url}`, indented by four. It is deterministic and proves little (no cost, no expiry, no endpoint), so it is
made once per URL. Ours is a compact JWS (EdDSA) that binds one request to one worker (`wire.tickets`); workers hold
only the public key. Both keys live in the data directory with mode 0600 and survive restarts: the public framework
fetches the key once and never again.

libsodium (PyNaCl) signs and verifies Ed25519: measured, 16 and 40 us against OpenSSL's 26 and 83 (`cryptography`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from nacl.signing import SigningKey

from comfyfleet.control.keys import secret_file
from comfyfleet.wire.routing import RouteReady
from comfyfleet.wire.tickets import ALGORITHM, TYPE, TicketClaims

# How long a ticket admits its bearer. The client posts to the worker at once; the rest is for slow clocks.
TICKET_LIFETIME_S = 300.0
_SIGNATURES_KEPT = 50_000

_encoder = msgspec.json.Encoder()
_Key = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


_HEADER = _base64url(_encoder.encode({"alg": ALGORITHM, "typ": TYPE}))


def signed_message(url: str) -> bytes:
    """The exact bytes that the public worker framework verifies."""
    return json.dumps({"url": url}, indent=4, sort_keys=True).encode()


class Tickets:
    """Signs. `open` loads both keys from a folder, or makes them there on first use."""

    def __init__(self, rsa_key: rsa.RSAPrivateKey, ed25519_key: ed25519.Ed25519PrivateKey) -> None:
        self._rsa = rsa_key
        self._ed25519 = SigningKey(ed25519_key.private_bytes_raw())
        self._signatures: dict[str, str] = {}
        self.rsa_public_pem = _public_pem(rsa_key.public_key())
        self.ed25519_public_pem = _public_pem(ed25519_key.public_key())

    @classmethod
    def open(cls, folder: Path) -> Tickets:
        """Keys from `ticket_rsa.pem` and `ticket_ed25519.pem` in `folder`; blocks, 0.1 s when they must be made."""
        rsa_key = _load_or_make(
            folder / "ticket_rsa.pem", lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )
        ed25519_key = _load_or_make(folder / "ticket_ed25519.pem", ed25519.Ed25519PrivateKey.generate)
        if not isinstance(rsa_key, rsa.RSAPrivateKey) or not isinstance(ed25519_key, ed25519.Ed25519PrivateKey):
            raise TypeError(f"the ticket keys in {folder} are of the wrong kind")
        return cls(rsa_key, ed25519_key)

    def signature(self, url: str) -> str:
        """Base64 of the compatible signature over `url`."""
        known = self._signatures.get(url)
        if known is None:
            raw = self._rsa.sign(signed_message(url), padding.PKCS1v15(), hashes.SHA256())
            known = base64.b64encode(raw).decode()
            if len(self._signatures) >= _SIGNATURES_KEPT:
                self._signatures.clear()
            self._signatures[url] = known
        return known

    def ticket(self, claims: TicketClaims) -> str:
        """A compact JWS over the claims."""
        signing_input = _HEADER + b"." + _base64url(_encoder.encode(claims))
        return (signing_input + b"." + _base64url(self._ed25519.sign(signing_input).signature)).decode()

    def admit(self, claims: TicketClaims, request_id: str) -> RouteReady:
        """The answer that lets a caller in at a worker: both signatures over what it claims."""
        return RouteReady(
            endpoint=claims.endpoint,
            url=claims.url,
            cost=claims.cost,
            reqnum=claims.reqnum,
            request_idx=claims.request_idx,
            signature=self.signature(claims.url),
            ticket=self.ticket(claims),
            request_id=request_id,
        )


def _public_pem(key: rsa.RSAPublicKey | ed25519.Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def _load_or_make(path: Path, make: Callable[[], _Key]) -> object:
    pem = path.read_bytes() if path.exists() else secret_file(path, _private_pem(make()))[0]
    return serialization.load_pem_private_key(pem, password=None)


def _private_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

"""Check a ticket: is this request meant for this worker, now, for the first time?

Workers hold only the control plane's public key. A ticket is used up by its first use; what was used is remembered
until it would have expired anyway, so memory stays bounded by the tickets of one lifetime.
"""

from __future__ import annotations

import base64
import heapq
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from comfyfleet.clock import Clock
from comfyfleet.wire.errors import Unauthorized, Unprocessable
from comfyfleet.wire.tickets import ALGORITHM, TicketClaims
from comfyfleet.worker.agent.lease import Lease

AUTH_FIELDS = ("cost", "endpoint", "reqnum", "request_idx", "signature", "url")
CLOCK_SKEW_S = 5.0
MAX_TICKET_CHARS = 4096


class _Header(msgspec.Struct, frozen=True):
    alg: str


class TicketChecker:
    """Verifies tickets for one worker. `url` is what the worker reports; `endpoint` "" accepts any endpoint."""

    def __init__(
        self, *, public_key_pem: bytes, url: str, endpoint: str, incarnation: str, lease: Lease, clock: Clock
    ) -> None:
        key = load_pem_public_key(public_key_pem)
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError("the ticket key is not an Ed25519 key")
        self._key = VerifyKey(key.public_bytes_raw())
        self._url = url
        self._endpoint = endpoint
        self._incarnation = incarnation
        self._lease = lease
        self._clock = clock
        self._used: set[tuple[int, int]] = set()
        self._used_until: list[tuple[float, tuple[int, int]]] = []

    def consume(self, auth_data: Mapping[str, Any]) -> TicketClaims:
        """The claims of a good ticket, which is now used.

        Raises Unprocessable (shape), Unauthorized (reason), or Unavailable, which leaves the ticket unused.
        """
        claims = self.verify(auth_data)
        self._lease.demand()
        self._forget_expired()
        mark = (claims.request_idx, claims.reqnum)
        if mark in self._used:
            raise Unauthorized("this ticket was used before", reason="replayed")
        self._used.add(mark)
        heapq.heappush(self._used_until, (claims.exp + CLOCK_SKEW_S, mark))
        return claims

    def verify(self, auth_data: Mapping[str, Any]) -> TicketClaims:
        """As `consume`, but leaves the ticket unused: for following a job that the holder started."""
        missing = [name for name in AUTH_FIELDS if name not in auth_data]
        if missing:
            raise Unprocessable(f"auth_data lacks {', '.join(missing)}", field=f"auth_data.{missing[0]}")
        token = auth_data.get("ticket")
        if not isinstance(token, str) or not token:
            raise Unauthorized("auth_data has no ticket", reason="no_ticket")
        claims = self._claims(token)
        if claims.exp + CLOCK_SKEW_S < self._clock.now() or not math.isfinite(claims.exp):
            raise Unauthorized("this ticket has expired", reason="expired")
        if claims.url != self._url:
            raise Unauthorized("this ticket is for another worker", reason="other_worker")
        if self._endpoint and claims.endpoint != self._endpoint:
            raise Unauthorized("this ticket is for another endpoint", reason="other_endpoint")
        if claims.incarnation and self._incarnation and claims.incarnation != self._incarnation:
            raise Unauthorized("this ticket is for an earlier life of this worker", reason="other_incarnation")
        for name in ("url", "endpoint", "cost", "reqnum", "request_idx"):
            if auth_data[name] != getattr(claims, name):
                raise Unauthorized(f"auth_data.{name} is not what the ticket says", reason=f"changed_{name}")
        return claims

    def _claims(self, token: str) -> TicketClaims:
        try:
            if len(token) > MAX_TICKET_CHARS:
                raise ValueError("too long")
            head, body, signature = token.split(".")
            if msgspec.json.decode(_unpadded(head), type=_Header).alg != ALGORITHM:
                raise ValueError("other algorithm")
            self._key.verify(f"{head}.{body}".encode("ascii"), _unpadded(signature))
            return msgspec.json.decode(_unpadded(body), type=TicketClaims)
        except (ValueError, BadSignatureError, msgspec.DecodeError) as error:
            raise Unauthorized("this ticket was not signed by our control plane", reason="bad_signature") from error

    def _forget_expired(self) -> None:
        now = self._clock.now()
        while self._used_until and self._used_until[0][0] < now:
            self._used.discard(heapq.heappop(self._used_until)[1])


def _unpadded(part: str) -> bytes:
    return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)

"""One event as bytes and headers, in both dialects at once. Pure.

The body is the wrapper's: `{id, status, message, output, timings, extra}`. Headers: the wrapper's `X-Webhook-Signature:
sha256=<hex HMAC of the raw body>` and Standard Webhooks' `webhook-id`, `webhook-timestamp`, `webhook-signature`
(https://www.standardwebhooks.com, symmetric form). While secrets are rotated there are several: the first one signs
the old header, every one adds a `v1,` entry.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import msgspec

from comfyfleet.wire.generation import GenerateResult

_PREFIX = "whsec_"
_encoder = msgspec.json.Encoder()


def event_id(*facts: str) -> str:
    """The same id for the same facts, so that an event told again after a restart is recognised."""
    digest = hashlib.sha256("\x1f".join(facts).encode()).hexdigest()
    return f"evt_{digest[:32]}"


def result_body(result: GenerateResult, extra: dict[str, Any]) -> bytes:
    """The wrapper's body for a job that ended."""
    return _encoder.encode(
        {
            "id": result.id,
            "status": result.status,
            "message": result.message,
            "output": result.output,
            "timings": result.timings,
            "extra": extra,
        }
    )


def progress_body(job_id: str, status: str, message: str, progress: object, extra: dict[str, Any]) -> bytes:
    """The same shape for a job under way, with `progress` beside it."""
    return _encoder.encode(
        {
            "id": job_id,
            "status": status,
            "message": message,
            "output": [],
            "timings": {},
            "extra": extra,
            "progress": progress,
        }
    )


def headers(event: str, identity: str, body: bytes, *, secrets: Sequence[str], now_s: float) -> dict[str, str]:
    """All headers of one attempt; unsigned where there is no secret."""
    stamp = str(int(now_s))
    found = {
        "Content-Type": "application/json",
        "X-Comfyfleet-Event": event,
        "webhook-id": identity,
        "webhook-timestamp": stamp,
    }
    if secrets:
        digest = hmac.new(secrets[0].encode(), body, hashlib.sha256).hexdigest()
        found["X-Webhook-Signature"] = f"sha256={digest}"
        signed = f"{identity}.{stamp}.".encode() + body
        found["webhook-signature"] = " ".join(f"v1,{_standard_signature(secret, signed)}" for secret in secrets)
    return found


def _standard_signature(secret: str, signed: bytes) -> str:
    return base64.b64encode(hmac.new(standard_key(secret), signed, hashlib.sha256).digest()).decode()


def standard_key(secret: str) -> bytes:
    """The key bytes of a secret: base64 after `whsec_`, otherwise the text itself."""
    if secret.startswith(_PREFIX):
        try:
            return base64.b64decode(secret[len(_PREFIX) :], validate=True)
        except (binascii.Error, ValueError):
            pass  # a text that merely looks like one: use it as it stands
    return secret.encode()

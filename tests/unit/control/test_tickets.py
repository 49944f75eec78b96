"""Tickets: what the worker checks, kept over restarts, readable by nobody else."""

from __future__ import annotations

import base64
import json
import stat

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from comfyfleet.control.tickets import Tickets, signed_message
from comfyfleet.wire.tickets import TYPE, TicketClaims

CLAIMS = TicketClaims(
    url="http://1.2.3.4:3000", endpoint="comfy", cost=100.0, reqnum=7, request_idx=9, exp=1e9, sub="key:a"
)


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_a_ticket_is_a_compact_jws_that_the_public_key_verifies_claim_by_claim(tmp_path):
    tickets = Tickets.open(tmp_path)
    header, claims, signature = tickets.ticket(CLAIMS).split(".")
    key = serialization.load_pem_public_key(tickets.ed25519_public_pem.encode())

    key.verify(decoded(signature), f"{header}.{claims}".encode())
    with pytest.raises(InvalidSignature):
        key.verify(decoded(signature), f"{header}.{claims[:-2]}AA".encode())
    assert json.loads(decoded(header)) == {"alg": "EdDSA", "typ": TYPE}
    assert json.loads(decoded(claims)) == {
        "url": "http://1.2.3.4:3000",
        "endpoint": "comfy",
        "cost": 100.0,
        "reqnum": 7,
        "request_idx": 9,
        "exp": 1e9,
        "sub": "key:a",
        "incarnation": "",
    }


def test_the_compatible_signature_covers_the_exact_json_and_escapes_like_the_worker(tmp_path):
    tickets = Tickets.open(tmp_path)
    url = "http://café.example:3000"
    key = serialization.load_pem_public_key(tickets.rsa_public_pem.encode())

    assert signed_message(url) == b'{\n    "url": "http://caf\\u00e9.example:3000"\n}'
    key.verify(base64.b64decode(tickets.signature(url)), signed_message(url), padding.PKCS1v15(), hashes.SHA256())
    assert tickets.signature(url) is tickets.signature(url), "made once per URL"


def test_both_keys_survive_a_restart_and_are_their_owners_alone(tmp_path):
    before, after = Tickets.open(tmp_path), Tickets.open(tmp_path)

    assert before.rsa_public_pem == after.rsa_public_pem
    assert before.ed25519_public_pem == after.ed25519_public_pem
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}

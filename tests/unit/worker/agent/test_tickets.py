"""A ticket opens one worker, once, until it expires; whatever is changed in it closes the door."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import Unauthorized, Unavailable, Unprocessable
from comfyfleet.worker.agent.lease import Lease
from comfyfleet.worker.agent.tickets import TicketChecker

KEY = Ed25519PrivateKey.from_private_bytes(b"7" * 32)
PEM = KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
URL = "http://127.0.0.1:3000"


def signed(claims: dict[str, Any], key: Ed25519PrivateKey = KEY, algorithm: str = "EdDSA") -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    signing_input = f"{part({'alg': algorithm})}.{part(claims)}"
    signature = base64.urlsafe_b64encode(key.sign(signing_input.encode())).rstrip(b"=").decode()
    return f"{signing_input}.{signature}"


def auth_data(
    clock: FakeClock, key: Ed25519PrivateKey = KEY, algorithm: str = "EdDSA", **changes: Any
) -> dict[str, Any]:
    claims = {
        "url": URL,
        "endpoint": "e",
        "cost": 100.0,
        "reqnum": 5,
        "request_idx": 9,
        "exp": clock.now() + 60,
        "sub": "k",
    }
    claims.update(changes)
    shown = {name: claims[name] for name in ("url", "endpoint", "cost", "reqnum", "request_idx")}
    return {**shown, "signature": "compatible", "ticket": signed(claims, key, algorithm)}


def a_checker(
    clock: FakeClock, endpoint: str = "e", incarnation: str = "", lease: Lease | None = None
) -> TicketChecker:
    return TicketChecker(
        public_key_pem=PEM,
        url=URL,
        endpoint=endpoint,
        incarnation=incarnation,
        lease=lease or Lease(clock),
        clock=clock,
    )


def reason(refused: pytest.ExceptionInfo[Unauthorized]) -> str:
    return str(refused.value.details["reason"])


@pytest.mark.anyio
async def test_a_worker_that_cannot_report_takes_no_ticket_until_it_can_and_none_is_used_up(clock: FakeClock) -> None:
    lease = Lease(clock)
    checker, ticket = a_checker(clock, lease=lease), auth_data(clock)
    lease.renew(sent_at=clock.monotonic(), serve_for_s=30.0)
    await clock.advance(29.0)
    checker.consume(auth_data(clock, reqnum=6))
    await clock.advance(1.0)

    with pytest.raises(Unavailable):
        checker.consume(ticket)
    assert checker.verify(ticket).reqnum == 5, "what was begun may be followed"

    lease.renew(sent_at=clock.monotonic(), serve_for_s=30.0)
    assert checker.consume(ticket).reqnum == 5


def test_a_good_ticket_is_taken_once(clock: FakeClock) -> None:
    checker, ticket = a_checker(clock), auth_data(clock)

    assert checker.verify(ticket).sub == "k"
    assert checker.consume(ticket).request_idx == 9
    with pytest.raises(Unauthorized) as refused:
        checker.consume(ticket)
    assert reason(refused) == "replayed"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"url": "http://127.0.0.1:3010"}, "other_worker"),
        ({"endpoint": "another"}, "other_endpoint"),
        ({"exp": 1.0}, "expired"),
        ({"exp": 1e400}, "bad_signature"),
        ({"incarnation": "old"}, "other_incarnation"),
    ],
)
def test_a_ticket_for_something_else_is_refused_with_its_reason(
    clock: FakeClock, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(Unauthorized) as refused:
        a_checker(clock, incarnation="new").consume(auth_data(clock, **changes))

    assert reason(refused) == why


@pytest.mark.parametrize("field", ["url", "endpoint", "cost", "reqnum", "request_idx"])
def test_a_field_beside_the_ticket_that_says_otherwise_is_refused(clock: FakeClock, field: str) -> None:
    ticket = auth_data(clock)
    ticket[field] = 1.5 if field == "cost" else "changed"

    with pytest.raises(Unauthorized) as refused:
        a_checker(clock).consume(ticket)
    assert reason(refused) == f"changed_{field}"


def test_a_foreign_key_and_a_foreign_algorithm_are_refused(clock: FakeClock) -> None:
    foreign = Ed25519PrivateKey.from_private_bytes(b"8" * 32)

    for bad in (auth_data(clock, foreign), auth_data(clock, algorithm="none")):
        with pytest.raises(Unauthorized) as refused:
            a_checker(clock).consume(bad)
        assert reason(refused) == "bad_signature"


@pytest.mark.parametrize("field", ["cost", "endpoint", "reqnum", "request_idx", "signature", "url"])
def test_each_of_the_six_fields_is_demanded_by_name(clock: FakeClock, field: str) -> None:
    ticket = auth_data(clock)
    del ticket[field]

    with pytest.raises(Unprocessable) as refused:
        a_checker(clock).consume(ticket)
    assert refused.value.details["field"] == f"auth_data.{field}"


@given(st.text(max_size=200))
def test_no_text_that_we_did_not_sign_is_a_ticket(text: str) -> None:
    clock = FakeClock()
    ticket = {**auth_data(clock), "ticket": text}

    with pytest.raises(Unauthorized):
        a_checker(clock).consume(ticket)


def test_memory_of_used_tickets_ends_with_their_life(clock: FakeClock) -> None:
    checker = a_checker(clock)
    for number in range(50):
        checker.consume(auth_data(clock, reqnum=number))
        clock.jump(10)

    assert len(checker._used) < 10

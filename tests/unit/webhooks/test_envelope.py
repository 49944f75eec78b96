"""A receiver can check who spoke, in the wrapper's dialect and in the standard one, also while secrets change."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from comfyfleet.webhooks import envelope
from comfyfleet.wire.generation import GenerateResult, OutputEntry

OLD = "whsec_" + base64.b64encode(b"o" * 32).decode()
NEW = "whsec_" + base64.b64encode(b"n" * 32).decode()


def a_result() -> GenerateResult:
    output = OutputEntry(
        filename="a.mp3", local_path="/o/a.mp3", type="output", subfolder="", node_id="59", output_type="audio"
    )
    return GenerateResult(
        id="job-1", message="Processing complete.", status="completed", output=[output], timings={"total_ms": 5}
    )


def sent(body: bytes, *secrets: str, now_s: float | None = None) -> dict[str, str]:
    now = time.time() if now_s is None else now_s
    return envelope.headers("job.completed", "evt_1", body, secrets=secrets, now_s=now)


def test_the_body_is_the_wrappers() -> None:
    body = json.loads(envelope.result_body(a_result(), {"user": 7}))

    assert list(body) == ["id", "status", "message", "output", "timings", "extra"]
    assert (body["id"], body["status"], body["extra"]) == ("job-1", "completed", {"user": 7})
    assert body["output"][0]["filename"] == "a.mp3"


def test_the_wrappers_header_is_an_hmac_of_the_raw_body() -> None:
    body = envelope.result_body(a_result(), {})

    expected = hmac.new(b"plain secret", body, hashlib.sha256).hexdigest()
    assert sent(body, "plain secret")["X-Webhook-Signature"] == f"sha256={expected}"


@pytest.mark.parametrize("secret", [OLD, "plain secret", "whsec_not base64"])
def test_the_standard_library_accepts_it(secret: str) -> None:
    body = envelope.result_body(a_result(), {})
    key = envelope.standard_key(secret)

    assert Webhook(key).verify(body, sent(body, secret))["id"] == "job-1"
    if secret == OLD:
        Webhook(secret).verify(body, sent(body, secret))


def test_while_a_secret_is_rotated_both_old_and_new_receivers_accept() -> None:
    body = envelope.result_body(a_result(), {})
    headers = sent(body, NEW, OLD)

    assert Webhook(OLD).verify(body, headers) == Webhook(NEW).verify(body, headers)
    assert headers["X-Webhook-Signature"] == sent(body, NEW)["X-Webhook-Signature"]


ASCII_BYTES = st.text(st.characters(codec="ascii"), min_size=1, max_size=200).map(str.encode)


@given(body=ASCII_BYTES, at=st.integers(0, 199), bit=st.integers(0, 6))
def test_any_change_of_the_body_is_noticed(body: bytes, at: int, bit: int) -> None:
    headers = sent(body, OLD)
    changed = bytearray(body)
    changed[at % len(body)] ^= 1 << bit

    with pytest.raises(WebhookVerificationError):
        Webhook(OLD).verify(bytes(changed), headers)


def test_an_old_delivery_cannot_be_played_again() -> None:
    body = envelope.result_body(a_result(), {})

    with pytest.raises(WebhookVerificationError):
        Webhook(OLD).verify(body, sent(body, OLD, now_s=time.time() - 3600))


def test_without_a_secret_nothing_is_signed() -> None:
    headers = sent(b"{}")

    assert not {"X-Webhook-Signature", "webhook-signature"} & set(headers)
    assert headers["webhook-id"] == "evt_1"


def test_an_event_has_the_same_id_whenever_it_is_told() -> None:
    assert envelope.event_id("a", "job-1", "job.completed") == envelope.event_id("a", "job-1", "job.completed")
    assert envelope.event_id("a", "job-1", "job.completed") != envelope.event_id("a", "job-1job", ".completed")

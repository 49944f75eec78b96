"""Secrets do not reach a log line, whatever the caller passes."""

from __future__ import annotations

from comfyfleet.logs import mask_secrets, without_secrets


def test_secret_keys_and_secret_query_parameters_are_masked() -> None:
    event = {
        "event": "request.finished",
        "secret_access_key": "abc",
        "api_key": "k",
        "url": "http://h/route/?api_key=verysecret&x=1",
        "status": 200,
    }

    masked = mask_secrets(None, "info", event)

    assert masked["secret_access_key"] == masked["api_key"] == "***"
    assert masked["url"] == "http://h/route/?api_key=***&x=1"
    assert masked["status"] == 200


def test_what_a_child_said_holds_none_of_the_secrets_it_was_given() -> None:
    environment = {"HF_TOKEN": "hf_swordfish", "S3_ACCESS_KEY_ID": "AKIA1234", "DEBUG_KEY": "1", "WORKSPACE": "/data/x"}

    said = without_secrets("1 hf_swordfish AKIA1234 /data/x from https://me:swordfish@h/x?token=abc", environment)

    assert said == "1 *** *** /data/x from https://***@h/x?token=***"

"""Secrets do not reach a log line, whatever the caller passes."""

from __future__ import annotations

from comfyfleet.logs import mask_secrets


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

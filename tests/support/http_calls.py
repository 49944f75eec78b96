"""Plain HTTP from a test's own thread."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any


def post_json(url: str, body: Any) -> tuple[int, Any]:
    """(status, parsed JSON body) of a POST, whatever the status."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            body = error.read()
            try:
                return error.code, json.loads(body)
            except ValueError:
                raise AssertionError(f"{url} answered {error.code} {body[:300]!r} {error.headers}") from None

"""Bytes that are no JSON are the caller's fault at every door, whatever way they are wrong in."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.api.calling import parse
from comfyfleet.control.api.route import parse_route_request
from comfyfleet.wire.errors import BadRequest
from comfyfleet.worker.api.bodies import parse_body


class _Anything(msgspec.Struct):
    input: dict


DEEP = b"[" * 100_000
NOT_JSON = {
    "nothing": b"",
    "cut off": b'{"input": {',
    "not UTF-8": b'{"input": {"request_id": "\xff\xfe"}}',
    "not UTF-8 behind a wrong type": b'{"input": 5, "endpoint": 5, "more": "\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"input": {}}'.encode("utf-16"),
    "a lone surrogate": b'{"input": {"request_id": "\\ud800"}}',
    "NaN": b'{"input": {"deadline_s": NaN}}',
    "over the range of numbers": b'{"input": {"deadline_s": 1e999}}',
    "deep": b'{"input": {"workflow_json": ' + DEEP + b"}}",
    "deep in an unknown field": b'{"unknown": ' + DEEP + b"}",
}


@pytest.mark.parametrize("door", [parse_body, parse_route_request, lambda body: parse(body or b"-", _Anything)])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_bytes_that_are_no_json_are_a_bad_request_at_every_door(door, body) -> None:
    with pytest.raises(BadRequest):
        door(body)

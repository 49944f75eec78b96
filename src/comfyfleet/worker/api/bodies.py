"""From bytes to a `GenerateInput`; what is amiss in it is told by `wire.requests`."""

from __future__ import annotations

from typing import Any

import msgspec

from comfyfleet.web import NOT_JSON
from comfyfleet.wire.errors import BadRequest
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.requests import parse_payload


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """`{"input": {…}}`."""

    input: GenerateInput


_strict = msgspec.json.Decoder(Envelope)
_loose = msgspec.json.Decoder()


def parse_body(body: bytes) -> GenerateInput:
    """The request in a body. Raises BadRequest."""
    try:
        return _strict.decode(body).input
    except msgspec.ValidationError:
        return parse_payload(_decoded(body))  # perhaps only a "" where a number goes
    except NOT_JSON as problem:
        raise BadRequest(f"the body is not valid JSON: {problem}") from problem


def _decoded(body: bytes) -> Any:
    try:
        return _loose.decode(body)
    except NOT_JSON as problem:
        raise BadRequest(f"the body is not valid JSON: {problem}") from problem

"""From bytes to a `GenerateInput`, and refusals that name the field. Empty strings and nulls mean "not given"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from comfyfleet.web import NOT_JSON
from comfyfleet.wire.errors import BadRequest
from comfyfleet.wire.generation import GenerateInput

_FIELD = re.compile(r" - at `\$\.?([^`]*)`")
# What stands in these is the caller's own and stays as it is.
_OPAQUE = frozenset({"workflow_json", "modifications", "extra_params"})


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


def parse_payload(payload: object) -> GenerateInput:
    """The request in decoded JSON, as the agent has it. Raises BadRequest naming the field."""
    if not isinstance(payload, Mapping):
        raise BadRequest('the body must be an object with "input"', field="input")
    if not isinstance(payload.get("input"), Mapping):
        raise BadRequest('"input" is missing or not an object', field="input")
    try:
        return msgspec.convert(_given(payload["input"]), GenerateInput, strict=False)
    except (msgspec.ValidationError, RecursionError) as problem:
        found = _FIELD.search(str(problem))
        field = f"input.{found[1]}" if found else "input"
        reason = _FIELD.sub("", str(problem))
        raise BadRequest(f"{field}: {reason}", field=field) from problem


def _decoded(body: bytes) -> Any:
    try:
        return _loose.decode(body)
    except NOT_JSON as problem:
        raise BadRequest(f"the body is not valid JSON: {problem}") from problem


def _given(block: Mapping[str, Any]) -> dict[str, Any]:
    """`block` without what means "not given", two levels deep: input, and its s3 and webhook."""
    kept: dict[str, Any] = {}
    for name, value in block.items():
        if value is None or value == "":
            continue
        kept[name] = _given(value) if isinstance(value, Mapping) and name not in _OPAQUE else value
    return kept

"""What can be said of a request's `input` without an engine, a file or a network: its shape, and what is amiss in it.

Worker and control plane ask the same questions here, so that a durable job is refused at once, in the words in which
its worker would have refused it. Every refusal names the field. Empty strings and nulls mean "not given".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from comfyfleet.wire.errors import BadRequest, Unprocessable
from comfyfleet.wire.file_inputs import unfit_headers
from comfyfleet.wire.generation import REQUEST_ID, GenerateInput, S3Target

_FIELD = re.compile(r" - at `\$\.?([^`]*)`")
# What stands in these is the caller's own and stays as it is.
_OPAQUE = frozenset({"workflow_json", "modifications", "extra_params"})
_YEAR_S = 366 * 24 * 3600.0
# They become parts of a URL, of a signature and of a header.
_S3_TEXTS = {
    "bucket_name": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}"),
    "region": re.compile(r"[A-Za-z0-9-]{1,64}"),
    "access_key_id": re.compile(r"[!-~]{1,512}"),
    "secret_access_key": re.compile(r"[!-~]{1,512}"),
}


def parse_payload(payload: object) -> GenerateInput:
    """The request in decoded JSON, `{"input": {…}}`. Raises BadRequest naming the field."""
    if not isinstance(payload, Mapping):
        raise BadRequest('the body must be an object with "input"', field="input")
    if not isinstance(payload.get("input"), Mapping):
        raise BadRequest('"input" is missing or not an object', field="input")
    return parse_input(without_blanks(payload["input"]))


def parse_input(given: Mapping[str, Any]) -> GenerateInput:
    """`input` without its blanks. Raises BadRequest naming the field."""
    try:
        return msgspec.convert(given, GenerateInput, strict=False)
    except (msgspec.ValidationError, RecursionError) as problem:
        found = _FIELD.search(str(problem))
        field = f"input.{found[1]}" if found else "input"
        reason = _FIELD.sub("", str(problem))
        raise BadRequest(f"{field}: {reason}", field=field) from problem


def without_blanks(block: Mapping[str, Any]) -> dict[str, Any]:
    """`block` without what means "not given", two levels deep: input, and its s3 and webhook."""
    kept: dict[str, Any] = {}
    for name, value in block.items():
        if value is None or value == "":
            continue
        kept[name] = without_blanks(value) if isinstance(value, Mapping) and name not in _OPAQUE else value
    return kept


def check_request(request: GenerateInput) -> None:
    """What needs no graph: the id is a plain name, and there is exactly one kind of work. Raises BadRequest."""
    if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
        raise BadRequest(
            "request_id must be up to 128 letters, digits, dots, dashes and underscores, the first a letter or digit",
            field="input.request_id",
        )
    has_graph = request.workflow_json not in (None, "")
    if has_graph and request.modifier:
        raise BadRequest("give workflow_json or modifier, not both", field="input.workflow_json")
    if not has_graph and not request.modifier:
        raise BadRequest(
            "workflow_json is missing (or a modifier naming a workflow template)", field="input.workflow_json"
        )
    for field in ("deadline_s", "max_queue_wait_s", "expires_s"):
        if getattr(request, field) < 0:
            raise BadRequest(f"{field} must not be negative", field=f"input.{field}")
    for field, seconds in (("expires_s", request.expires_s), ("s3.expires_s", request.s3.expires_s)):
        if seconds > _YEAR_S:  # what can be reached is kept
            raise BadRequest(f"{field} must not be over a year", field=f"input.{field}")
    for index, credential in enumerate(request.credentials):
        if reason := unfit_headers(credential.headers):
            raise BadRequest(f"credentials[{index}].{reason}", field=f"input.credentials[{index}].headers")


def check_s3(target: S3Target, *, has_keys: bool, has_bucket: bool) -> None:
    """Half a destination is none. has_keys, has_bucket: what the operator's own settings bring beside it.

    A request may name an endpoint of its own only with keys of its own, or it could make the operator's keys sign for a
    stranger. Raises Unprocessable naming the field.
    """
    for field, allowed in _S3_TEXTS.items():
        text = getattr(target, field)
        if text and not allowed.fullmatch(text):
            raise Unprocessable(f"s3.{field} holds what it may not hold", field=f"input.s3.{field}")
    own_keys = bool(target.access_key_id and target.secret_access_key)
    if bool(target.access_key_id) != bool(target.secret_access_key):
        missing = "secret_access_key" if target.access_key_id else "access_key_id"
        raise Unprocessable(f"s3.{missing} is missing", field=f"input.s3.{missing}")
    if target.endpoint_url and not own_keys:
        raise Unprocessable(
            "s3.endpoint_url needs s3.access_key_id and s3.secret_access_key beside it", field="input.s3.endpoint_url"
        )
    if own_keys and not target.bucket_name and not has_bucket:
        raise Unprocessable("s3.bucket_name is missing", field="input.s3.bucket_name")
    if target.bucket_name and not own_keys and not has_keys:
        raise Unprocessable(
            "s3.bucket_name needs s3.access_key_id and s3.secret_access_key: the worker has none of its own",
            field="input.s3.access_key_id",
        )

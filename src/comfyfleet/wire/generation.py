"""The wrapper's wire: what `/generate*` takes and what every result looks like. The documents' samples are law.

Requests: unknown fields are accepted and ignored; empty strings mean "not given" (the documents send them). Results
are built with `msgspec` structs whose fields stand in the documents' order, then ours.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RANDOM_INT = "__RANDOM_INT__"


class S3Target(msgspec.Struct, frozen=True, kw_only=True):
    """Per-request object storage. Secret: never logged, never returned."""

    access_key_id: str = ""
    secret_access_key: str = ""
    endpoint_url: str = ""
    bucket_name: str = ""
    region: str = ""
    connect_timeout: float = 0.0  # seconds; 0 is not given, here and below
    connect_attempts: int = 0
    expires_s: float = 0.0


class WebhookTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Per-request webhook. `secret` is never logged or returned."""

    url: str = ""
    extra_params: dict[str, Any] = {}
    secret: str = ""
    timeout: float = 30.0
    events: tuple[str, ...] = ()


class UrlCredential(msgspec.Struct, frozen=True, kw_only=True):
    """Headers for input URLs at or below `url_prefix`, and for no other host. Secret: never logged, never returned."""

    url_prefix: str
    headers: dict[str, str] = {}


class GenerateInput(msgspec.Struct, frozen=True, kw_only=True):
    """`input` of a request; either `workflow_json`, or `modifier` with `modifications`."""

    request_id: str = ""
    workflow_json: Any = None
    modifier: str = ""
    modifications: dict[str, Any] = {}
    s3: S3Target = S3Target()
    webhook: WebhookTarget = WebhookTarget()
    credentials: tuple[UrlCredential, ...] = ()
    return_outputs_as_base64: bool = False
    deadline_s: float = 0.0
    max_queue_wait_s: float = 0.0
    force: bool = False  # render again even if the engine would answer from its cache
    expires_s: float = 0.0


class OutputEntry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One file. The documents' seven fields first, always present; the rest where known."""

    filename: str
    local_path: str
    type: str
    subfolder: str
    node_id: str
    output_type: str
    url: str = msgspec.field(default_factory=str)
    kind: str = ""  # image | video | audio | text | file
    mime: str = ""
    size_bytes: int | None = None
    sha256: str = ""
    duration_s: float | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    frames: int | None = None
    channels: int | None = None
    sample_rate: int | None = None
    poster_url: str = ""
    peaks: list[float] | None = None
    url_expires_at: float | None = None
    upload_error: str = ""
    error: str = ""
    data: str = ""
    mimetype: str = ""
    text: str | None = None  # what a node said in words; the file beside it holds the same


class GenerateResult(msgspec.Struct, kw_only=True):
    """The documents' answer: id, message, status, comfyui_response, output[], timings; then ours."""

    id: str
    message: str
    status: str
    comfyui_response: dict[str, Any] = msgspec.field(default_factory=dict)
    output: list[OutputEntry] = msgspec.field(default_factory=list)
    timings: dict[str, Any] = msgspec.field(default_factory=dict)
    miniature: bool = False
    reused: bool = False
    error: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET

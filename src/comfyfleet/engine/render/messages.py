"""What the server and its render process say to each other: a frame is 4 bytes of length (big endian) and JSON.

JSON, not msgpack: a prompt may hold integers of more than 64 bits, and they must survive.
"""

from __future__ import annotations

from typing import Any

import msgspec

from comfyfleet.engine.events import Event, RunOutcome
from comfyfleet.engine.registry import Declaration

LENGTH_BYTES = 4


class Run(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`number` names this run in all that is said of it: two prompts may bring the same id."""

    number: int
    prompt_id: str
    graph: dict[str, Any]
    outputs: list[str]
    extra_pnginfo: dict[str, Any]
    wants_previews: bool


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop this run, if it has not ended."""

    number: int


class Free(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Said only while nothing runs; done before what is said next."""

    unload_models: bool
    drop_results: bool


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device as `GET /system_stats` tells it; memory in bytes."""

    name: str
    type: str
    index: int | None
    vram_total: int
    vram_free: int
    torch_vram_total: int
    torch_vram_free: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The child can render: what it knows, so that the server can check and describe graphs without torch."""

    declarations: dict[str, Declaration]
    devices: list[Device]
    torch_version: str


class CannotStart(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The child ends instead of being Ready, and would the next time."""

    reason: str


class Told(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int
    event: Event


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int
    outcome: RunOutcome
    devices: list[Device]


Command = Run | Stop | Free
Report = Ready | CannotStart | Told | Done

_encoder = msgspec.json.Encoder()
decode_command = msgspec.json.Decoder(Command).decode
decode_report = msgspec.json.Decoder(Report).decode


def frame(message: Command | Report) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body

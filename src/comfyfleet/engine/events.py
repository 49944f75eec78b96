"""What a run tells while it goes: plain values that cross a process boundary, in the order things happened.

They say less than ComfyUI's messages (a step, not the state of all nodes); `server.messages` makes those from these,
so a run of a thousand nodes costs the executor a thousand small events and no square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

Ui = dict[str, list[Any]]


class RunStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    timestamp_ms: int


class CacheHits(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nodes of the prompt whose results are known already, needed or not, in the prompt's order."""

    nodes: list[str]
    timestamp_ms: int


class NodeStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    node: str


class NodeProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step. `preview` is a JPEG of 512 pixels a side, or a whole picture as PNG."""

    node: str
    value: float
    maximum: float
    preview: bytes | None = None
    preview_is_png: bool = False


class NodeShown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The node has something to show (`executed` in ComfyUI); follows its start, precedes its end."""

    node: str
    ui: Ui


class NodeFinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    node: str


class NodeReused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An output asked for whose result was known: nothing ran."""

    node: str
    ui: Ui | None


class SamplingEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The run has sampled and will not sample again: what is left is decoding and saving, beside which another may run.

    No client is told; whoever gives out prompts is.
    """


class RunSucceeded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    timestamp_ms: int


class RunFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    node_id: str
    node_type: str
    executed: list[str]
    exception_message: str
    exception_type: str
    traceback: list[str]
    current_inputs: dict[str, Any]
    current_outputs: list[str]
    timestamp_ms: int


class RunInterrupted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    node_id: str
    node_type: str
    executed: list[str]
    timestamp_ms: int


Event = (
    RunStarted
    | CacheHits
    | NodeStarted
    | NodeProgress
    | NodeShown
    | NodeFinished
    | NodeReused
    | SamplingEnded
    | RunSucceeded
    | RunFailed
    | RunInterrupted
)
Emit = Callable[[Event], None]


class RunOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. `outputs` holds the ui of every node of the prompt that has one, asked for or not.

    resident_models: model files that have something in memory now.
    """

    status: Literal["success", "error", "interrupted"]
    outputs: dict[str, Ui]
    miniature: bool = False
    resident_models: tuple[str, ...] = ()
    failure: RunFailed | None = None

"""A workflow's shape: a digest of what makes it take long. Two runs of one shape take about the same time.

In it: node types, links, numbers and short options (steps, sizes, sampler names, model files). Not in it: texts, seeds,
file prefixes and the names of input files. Router and worker learn durations by it; models named by a workflow are
found here as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from comfyfleet.wire.workflow import Graph, is_link

_NO_COST = frozenset(
    {"seed", "noise_seed", "filename_prefix", "text", "tags", "lyrics", "color", "prompt", "image", "audio", "video"}
)
_NUMBERS = frozenset({int, float, bool})
_SHORT = 128
_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")
_encode = msgspec.json.Encoder(order="sorted").encode


def shape_of(graph: Graph) -> str:
    """16 hex digits; equal for graphs that differ only in what costs no time."""
    nodes = {
        node_id: [
            node["class_type"],
            {
                name: value if type(value) in _NUMBERS and name not in _NO_COST else _cost(name, value)
                for name, value in node["inputs"].items()
            },
        ]
        for node_id, node in graph.items()
    }
    return hashlib.sha256(_encode(nodes)).hexdigest()[:16]


def models_of(graph: Graph) -> tuple[str, ...]:
    """Model files that a workflow names, sorted."""
    found = {
        value
        for node in graph.values()
        for value in node["inputs"].values()
        if isinstance(value, str) and value.lower().endswith(_MODEL_SUFFIXES) and len(value) <= 1024
    }
    return tuple(sorted(found))


def _cost(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return None if name in _NO_COST or len(value) > _SHORT else value
    if is_link(value):
        return value
    if name in _NO_COST or isinstance(value, (list, Mapping)):
        return None
    return value

"""The name of a result: a digest of a node's class, its inputs, the files behind them, and the same of all before it.

Equal signatures mean equal results, whatever the node ids are. A node whose signature cannot be told (it hangs on a
cycle or on a node that is not there) has none and is never taken from the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from comfyfleet.engine.registry import Declaration
from comfyfleet.wire.workflow import is_link

_encode = msgspec.json.Encoder(order="sorted").encode

# What a value stands for beyond itself: (declaration, input name, value) -> text, "" for most.
FileMark = Callable[[Declaration, str, Any], str]


def signatures(
    graph: Mapping[str, Any], declarations: Callable[[str], Declaration | None], file_mark: FileMark
) -> dict[str, str]:
    """Signature by node id, for every node that has one. Never recurses: chains may be long."""
    found: dict[str, str] = {}
    hopeless: set[str] = set()
    for start in graph:
        stack = [start]
        entered: set[str] = set()
        while stack:
            node_id = stack[-1]
            if node_id in found or node_id in hopeless:
                stack.pop()
                continue
            declaration = declarations(graph[node_id]["class_type"])
            if declaration is not None and declaration.is_volatile:
                hopeless.add(node_id)
                stack.pop()
                continue
            sources = links_of(graph[node_id], declaration)
            waiting = [source for source in sources if source not in found]
            if node_id in entered or not waiting:
                # Visited twice and still waiting: what it waits for is missing, hopeless, or itself on this path.
                stack.pop()
                if waiting:
                    hopeless.add(node_id)
                else:
                    found[node_id] = _signature(graph[node_id], declarations, found, file_mark)
                continue
            entered.add(node_id)
            if any(source not in graph or source in hopeless or source in entered for source in waiting):
                hopeless.add(node_id)
                stack.pop()
                continue
            stack.extend(waiting)
    return found


def links_of(node: Mapping[str, Any], declaration: Declaration | None) -> list[str]:
    """The nodes that a node takes from, in the order of its inputs; only through inputs that it has."""
    return [
        value[0]
        for name, value in node["inputs"].items()
        if is_link(value) and (declaration is None or name in declaration.inputs)
    ]


def _signature(
    node: Mapping[str, Any],
    declarations: Callable[[str], Declaration | None],
    found: Mapping[str, str],
    file_mark: FileMark,
) -> str:
    declaration = declarations(node["class_type"])
    parts: list[Any] = [node["class_type"]]
    for name in sorted(node["inputs"]):
        value = node["inputs"][name]
        if declaration is not None and name not in declaration.inputs:
            # As in ComfyUI: an input that the node does not have counts, though nothing reads it. The worker's
            # `force` rests on this. A link there may lead to what is not part of the run.
            parts.append([name, value])
        elif is_link(value):
            parts.append([name, found[value[0]], value[1]])
        else:
            parts.append([name, [value, file_mark(declaration, name, value) if declaration is not None else ""]])
    return hashlib.blake2b(_encode(parts), digest_size=16).hexdigest()

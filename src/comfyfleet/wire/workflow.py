"""A workflow graph in ComfyUI's API format: parsed and bounded once, before anything acts on it.

This is the shape check every role can do without knowing any node: an object of nodes, each with a class_type and an
inputs object, bounded in size and depth, with finite numbers and no cycle. What a node's inputs may hold is the
engine's business. The bounds exist because some graphs kill a ComfyUI (its worker thread dies on depth ~900 and on
nodes without inputs; a chain of ~2,000 nodes exhausts its recursion).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from comfyfleet.wire.errors import BadRequest, WorkflowRefused

MAX_NODES = 1500
MAX_DEPTH = 64
MAX_CHAIN = 900

Graph = dict[str, dict[str, Any]]

_FIT = frozenset({str, int, bool, type(None)})
# What JSON gives comes first: asking an abstract class costs ten times as much.
_OBJECT = (dict, Mapping)


def parse_graph(value: object, *, field: str = "workflow_json") -> Graph:
    """A rebuilt graph: every node exactly `{class_type, inputs, _meta?}`. Raises BadRequest or WorkflowRefused."""
    if not isinstance(value, _OBJECT):
        raise BadRequest(f"{field} must be an object of nodes", field=field)
    if not value:
        raise WorkflowRefused(f"{field} has no node", field=field)
    if isinstance(value.get("nodes"), list) and "links" in value:
        raise WorkflowRefused(
            f"{field} is a canvas file; export it with “Save (API format)”",
            field=field,
            reason="canvas_format",
        )
    if len(value) > MAX_NODES:
        raise WorkflowRefused(f"{field} has {len(value)} nodes, the limit is {MAX_NODES}", field=field)
    graph = {str(node_id): _parse_node(str(node_id), node) for node_id, node in value.items()}
    check_acyclic(graph)
    return graph


def read_graph(content: bytes, *, field: str) -> Graph:
    """`parse_graph` of a file's content. Raises BadRequest, too, for what is no JSON."""
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        raise BadRequest(f"{field} is not valid JSON: {problem}", field=field) from problem
    return parse_graph(value, field=field)


def _parse_node(node_id: str, node: object) -> dict[str, Any]:
    if not isinstance(node, _OBJECT):
        raise WorkflowRefused(f"node {node_id} must be an object", node_id=node_id)
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or not class_type:
        raise WorkflowRefused(f"node {node_id} has no class_type", node_id=node_id, input="class_type")
    inputs = node.get("inputs")
    if not isinstance(inputs, _OBJECT):
        raise WorkflowRefused(
            f"node {node_id} ({class_type}) has no inputs object",
            node_id=node_id,
            class_type=class_type,
            input="inputs",
        )
    kept: dict[str, Any] = {}
    for name, given in inputs.items():
        kept[str(name)] = given
        if type(given) not in _FIT and not is_link(given) and (reason := unfit_value(given)):
            raise WorkflowRefused(
                f"node {node_id} ({class_type}), input {name}: {reason}",
                node_id=node_id,
                class_type=class_type,
                input=str(name),
            )
    rebuilt: dict[str, Any] = {"class_type": class_type, "inputs": kept}
    meta = node.get("_meta")
    if meta is not None and isinstance(meta, _OBJECT) and unfit_value(meta) is None:
        rebuilt["_meta"] = dict(meta)
    return rebuilt


def unfit_value(value: object, max_depth: int = MAX_DEPTH) -> str | None:
    """Why a JSON value must not be forwarded (too deep, not finite), or None. Never recurses."""
    if type(value) in _FIT:  # nearly every input: the loop below is three times slower
        return None
    if type(value) is float:
        return None if math.isfinite(value) else "not a finite number"
    stack: list[tuple[object, int]] = [(value, 1)]
    while stack:
        current, depth = stack.pop()
        if depth > max_depth:
            return f"nested deeper than {max_depth} levels"
        if type(current) in _FIT:
            continue
        if isinstance(current, float) and not math.isfinite(current):
            return "not a finite number"
        if isinstance(current, _OBJECT):
            stack.extend((inner, depth + 1) for inner in current.values())
        elif isinstance(current, list):
            stack.extend((inner, depth + 1) for inner in current)
    return None


def is_link(value: object) -> bool:
    """True for `[node_id, output_index]`, the form of a link in JSON: asked of every input, several times a job."""
    return type(value) is list and len(value) == 2 and type(value[0]) is str and type(value[1]) is int


def links(node: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(input name, source node id, output index) of a parsed node."""
    for name, value in node["inputs"].items():
        if type(value) not in _FIT and is_link(value):
            yield name, value[0], value[1]


def check_acyclic(graph: Graph) -> None:
    """Raises WorkflowRefused naming a node on a cycle, or at the end of a chain longer than MAX_CHAIN."""
    users: dict[str, list[str]] = {}
    missing = dict.fromkeys(graph, 0)
    for node_id, node in graph.items():
        for value in node["inputs"].values():
            if type(value) not in _FIT and is_link(value) and value[0] in graph:
                users.setdefault(value[0], []).append(node_id)
                missing[node_id] += 1
    length = dict.fromkeys(graph, 1)
    ready = [node_id for node_id, count in missing.items() if not count]
    done = 0
    while ready:
        current = ready.pop()
        done += 1
        if length[current] > MAX_CHAIN:
            raise WorkflowRefused(f"node {current} ends a chain of over {MAX_CHAIN} nodes", node_id=current)
        for user in users.get(current, ()):
            if length[user] <= length[current]:
                length[user] = length[current] + 1
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    if done < len(graph):
        on_cycle = _node_on_cycle(_waiting(graph, missing))
        raise WorkflowRefused(
            f"node {on_cycle} ({graph[on_cycle]['class_type']}) depends on itself: the links form a cycle",
            node_id=on_cycle,
            class_type=graph[on_cycle]["class_type"],
            reason="cycle",
        )


def _waiting(graph: Graph, missing: Mapping[str, int]) -> dict[str, set[str]]:
    """What each node that is left still waits for."""
    return {
        node_id: {source for _, source, _ in links(graph[node_id]) if missing.get(source)}
        for node_id, count in missing.items()
        if count
    }


def _node_on_cycle(waiting: Mapping[str, set[str]]) -> str:
    """A node of a cycle, not one that merely depends on it: walk up from any that waits until one comes twice."""
    current = min(node_id for node_id, sources in waiting.items() if sources)
    passed: list[str] = []
    while current not in passed:
        passed.append(current)
        current = min(source for source in waiting[current] if waiting[source])
    return min(passed[passed.index(current) :])

"""Stage one: from a request to a graph that is safe to send. Pure but for the dice of `__RANDOM_INT__`."""

from __future__ import annotations

from typing import Any

from comfyfleet.ids import Ids
from comfyfleet.wire.generation import RANDOM_INT, GenerateInput
from comfyfleet.wire.workflow import Graph, is_link, parse_graph
from comfyfleet.worker.templates import Templates

# An input that no node declares: ComfyUI ignores its value but counts it into the cache key of the node that has it.
NONCE = "comfyfleet_nonce"


def build_graph(request: GenerateInput, templates: Templates) -> Graph:
    """The checked and rebuilt graph of a request, placeholders still in it. Raises BadRequest or WorkflowRefused."""
    if request.modifier:
        return parse_graph(templates.fill(request.modifier, request.modifications), field="input.modifier")
    return parse_graph(request.workflow_json, field="input.workflow_json")


def roll_dice(graph: Graph, ids: Ids) -> Graph:
    """Each `__RANDOM_INT__` becomes a number of its own: an int where it is the whole string, text inside one."""
    return {
        node_id: {**node, "inputs": {name: _rolled(value, ids) for name, value in node["inputs"].items()}}
        for node_id, node in graph.items()
    }


def _rolled(value: Any, ids: Ids) -> Any:
    if isinstance(value, str) and RANDOM_INT in value:
        if value == RANDOM_INT:
            return ids.random_int()
        head, *rest = value.split(RANDOM_INT)
        return head + "".join(f"{ids.random_int()}{part}" for part in rest)
    if isinstance(value, list):
        return [_rolled(inner, ids) for inner in value]
    if isinstance(value, dict):
        return {name: _rolled(inner, ids) for name, inner in value.items()}
    return value


def with_nonce(graph: Graph, nonce: str, node_ids: set[str] | None = None) -> Graph:
    """A copy whose nodes `node_ids` miss the engine's cache; None: every node that loads nothing (`force`)."""
    return {
        node_id: {**node, "inputs": {**node["inputs"], NONCE: nonce}}
        if (node_id in node_ids if node_ids is not None else not _loads(node))
        else node
        for node_id, node in graph.items()
    }


def _loads(node: dict[str, Any]) -> bool:
    """A loader: rendering again need not read a model from disk again."""
    return "Loader" in node["class_type"] and not any(is_link(value) for value in node["inputs"].values())

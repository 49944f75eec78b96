"""ComfyUI's refusal of a graph as ours: node and input named, all node errors kept, server paths left out. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from comfyfleet.wire.errors import WorkflowRefused
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.engines.faults import without_paths

BROKEN_LINK_TYPES = frozenset({"exception_during_validation", "exception_during_inner_validation"})


def refusal(answer: Mapping[str, Any], graph: Graph) -> WorkflowRefused:
    """The error for a 400, or for a 200 with node errors; the first bad node is the one that is named."""
    node_errors = {
        str(node_id): {
            "class_type": found.get("class_type", ""),
            "errors": [_one(error) for error in found.get("errors", [])],
        }
        for node_id, found in (answer.get("node_errors") or {}).items()
    }
    for node_id, found in node_errors.items():
        for one in found["errors"]:
            return _at_node(node_id, found["class_type"], one, node_errors)
    error = answer.get("error") or {}
    details = without_paths(str(error.get("details", "")))
    bad_node = details.partition("'#")[2].rstrip("'") or None
    message = without_paths(str(error.get("message", "the engine refused the workflow")))
    # The embedded engine names the nearest class; ComfyUI names none.
    nearest = (error.get("extra_info") or {}).get("nearest")
    return WorkflowRefused(
        f"{message} {details}".strip() + (f"; the nearest there is: {nearest!r}" if nearest else ""),
        node_id=bad_node,
        class_type=graph[bad_node]["class_type"] if bad_node in graph else None,
        input="class_type" if bad_node in graph else None,
        type=error.get("type"),
        nearest=nearest,
        node_errors=node_errors or None,
    )


def with_nearest(error: WorkflowRefused, spec: Any) -> WorkflowRefused:
    """`error`, offering the name in `spec` (an input of `/object_info`) that is most like the one asked for."""
    options = _options(spec)
    asked = str(error.details.get("received_value", ""))
    found = difflib.get_close_matches(asked, options, n=1, cutoff=0.3)
    if found:
        error.details["nearest"] = found[0]
        error.message += f"; the nearest there is: {found[0]!r}"
    elif not options:
        error.message += "; there is none at all"
    return error


def with_broken_link(error: WorkflowRefused, graph: Graph, outputs: Mapping[str, int]) -> WorkflowRefused:
    """`error`, naming the input whose link leads nowhere.

    ComfyUI stumbles over such a link and tells only what Python said (`'99'`, `tuple index out of range`), or names
    the input of the node behind. outputs: how many outputs a class has, for the classes that are known.
    """
    node_id = str(error.details.get("node_id"))
    for name, value in graph.get(node_id, {}).get("inputs", {}).items():
        if isinstance(value, list) and len(value) == 2 and (reason := _why_broken(value, graph, outputs)):
            error.details["input"] = name
            error.message = f"node {node_id} ({graph[node_id]['class_type']}), input {name}: {reason}"
            break
    return error


def _why_broken(link: list[Any], graph: Graph, outputs: Mapping[str, int]) -> str:
    source, index = link
    if not isinstance(source, str) or source not in graph:
        return f"it is linked to node {source!r}, which is not in the workflow"
    class_type = graph[source]["class_type"]
    count = outputs.get(class_type)
    if type(index) is not int or (count is not None and not -count <= index < count):
        known = "" if count is None else f" (it has {count})"
        return f"it is linked to output {index!r} of node {source} ({class_type}), which is not there{known}"
    return ""


def _at_node(node_id: str, class_type: str, one: dict[str, Any], node_errors: dict[str, Any]) -> WorkflowRefused:
    message = f"node {node_id} ({class_type})"
    if one["input"]:
        message += f", input {one['input']}"
    message += f": {one['message']}"
    if one["details"] and one["details"] != one["input"]:
        message += f": {one['details']}"
    return WorkflowRefused(
        message,
        node_id=node_id,
        class_type=class_type,
        input=one["input"],
        type=one["type"],
        received_value=one["received_value"],
        node_errors=node_errors,
    )


def _one(error: Mapping[str, Any]) -> dict[str, Any]:
    extra = error.get("extra_info") or {}
    return {
        "type": error.get("type", ""),
        "message": without_paths(str(error.get("message", ""))),
        "details": without_paths(str(error.get("details", ""))),
        "input": extra.get("input_name"),
        "received_value": extra.get("received_value"),
    }


def _options(spec: Any) -> list[str]:
    """`[[options], …]`, or the newer `["COMBO", {"options": […]}]`."""
    if not isinstance(spec, list) or not spec:
        return []
    listed = spec[0]
    if not isinstance(listed, list) and len(spec) > 1 and isinstance(spec[1], dict):
        listed = spec[1].get("options")
    return [option for option in listed if isinstance(option, str)] if isinstance(listed, list) else []

"""What the router may know of a request before a worker is chosen: its workflow's shape and models. Pure.

With it a route call is weighed by what such a workflow really cost before, and sent where its models are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.shapes import models_of, shape_of
from comfyfleet.wire.workflow import parse_graph

_MOST_MODELS = 64


def hint_of(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """The hint for `/route/`; None where the payload has no workflow, or one that the worker will refuse."""
    given = payload.get("input")
    workflow = given.get("workflow_json") if isinstance(given, Mapping) else None
    if not isinstance(workflow, Mapping):
        return None
    try:
        graph = parse_graph(workflow)
    except FleetError:
        return None
    return {"shape": shape_of(graph), "models": list(models_of(graph))[:_MOST_MODELS]}

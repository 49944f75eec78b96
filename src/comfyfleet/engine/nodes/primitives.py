"""Plain values as nodes, so that one value can feed several inputs."""

from __future__ import annotations

import json
from typing import Any

from comfyfleet.engine.registry import Input, NodeRegistry, NodeRun, Shown, link

NODES = NodeRegistry()
WHOLE = 2**63 - 1
COUNTED = {"control_after_generate": True}
PRIMITIVES: dict[str, tuple[str, str, Input]] = {
    "PrimitiveString": ("String", "STRING", Input(kind="STRING")),
    "PrimitiveStringMultiline": ("String (Multiline)", "STRING", Input(kind="STRING", details={"multiline": True})),
    "PrimitiveInt": (
        "Int",
        "INT",
        Input(kind="INT", minimum=-WHOLE, maximum=WHOLE, details=COUNTED),
    ),
    "PrimitiveFloat": ("Float", "FLOAT", Input(kind="FLOAT", minimum=-WHOLE, maximum=WHOLE)),
    "PrimitiveBoolean": ("Boolean", "BOOLEAN", Input(kind="BOOLEAN")),
}


def give(run: NodeRun, *, value: Any) -> tuple[Any]:
    return (value,)


for _name, (_display_name, _kind, _declared) in PRIMITIVES.items():
    NODES.node(
        _name,
        inputs={"value": _declared},
        outputs=[_kind],
        category="utils/primitive",
        display_name=_display_name,
    )(give)


@NODES.node(
    "PreviewAny",
    inputs={"source": link("*")},
    category="utils",
    display_name="Preview Any",
    is_output=True,
)
def preview_any(run: NodeRun, *, source: Any) -> Shown:
    """Whatever comes, as text: a plain value as Python writes it, a structure as JSON where it has one."""
    if isinstance(source, str | int | float):
        return Shown(ui={"text": [str(source)]})
    try:
        return Shown(ui={"text": [json.dumps(source)]})
    except TypeError:
        return Shown(ui={"text": [str(source)]})

"""Workflow templates for `modifier` and `modifications`: a graph in a file, and names for the inputs one may change.

A file `<Name>.json` holds `{"description", "parameters": {name: {"node", "input", "default"?, "description"?}},
"workflow": graph}`. A parameter may name several places (`"targets": [{node, input}, …]`). The user's folder comes
before the one that ships.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import msgspec

from comfyfleet.wire.errors import BadRequest, NotFound

SHIPPED = Path(__file__).parent / "workflows"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One input of one node."""

    node: str
    input: str


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A named input; `default` replaces what the graph holds when the caller gives none."""

    targets: tuple[Target, ...] = ()
    node: str = ""
    input: str = ""
    default: Any = None
    description: str = ""

    def places(self) -> tuple[Target, ...]:
        return self.targets or (Target(node=self.node, input=self.input),)


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed template file."""

    workflow: dict[str, Any]
    parameters: dict[str, Parameter] = {}
    description: str = ""


class Templates:
    """Templates by name, read when asked for: a folder may change while the worker runs."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders

    def names(self) -> list[str]:
        return sorted({path.stem for folder in self._folders for path in folder.glob("*.json")})

    def fill(self, name: str, modifications: dict[str, Any]) -> dict[str, Any]:
        """The template's graph with `modifications` in it. Raises NotFound, or BadRequest naming a parameter."""
        template = self._read(name)
        unknown = sorted(set(modifications) - set(template.parameters))
        if unknown:
            raise BadRequest(
                f"template {name} has no parameter {unknown[0]!r}; it has {', '.join(sorted(template.parameters))}",
                field=f"modifications.{unknown[0]}",
            )
        graph = copy.deepcopy(template.workflow)
        for parameter_name, parameter in template.parameters.items():
            value = modifications.get(parameter_name, parameter.default)
            if value is None or value == "":
                continue
            for place in parameter.places():
                if place.node not in graph:
                    raise BadRequest(f"template {name}: parameter {parameter_name} names node {place.node}, not there")
                graph[place.node].setdefault("inputs", {})[place.input] = value
        return graph

    def _read(self, name: str) -> Template:
        if _NAME.fullmatch(name):
            for folder in self._folders:
                path = folder / f"{name}.json"
                if path.is_file():
                    try:
                        return msgspec.json.decode(path.read_bytes(), type=Template)
                    except msgspec.MsgspecError as error:
                        raise BadRequest(f"template {name} cannot be read: {error}", field="modifier") from error
        raise NotFound(f"no workflow template {name!r}; there are {', '.join(self.names())}", field="modifier")

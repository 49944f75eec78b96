"""The nodes, a module per domain. Adding one is a function and its declaration in one file.

A module here with a `NODES` registry is found by itself. Importing them loads torch, so only a render process does it;
others are told the declarations.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from comfyfleet.engine.registry import NodeRegistry


def all_nodes() -> NodeRegistry:
    """Every node of this engine. Raises ValueError when two modules declare the same name."""
    registry = NodeRegistry()
    for found in pkgutil.iter_modules(__path__):
        declared = getattr(import_module(f"{__name__}.{found.name}"), "NODES", None)
        if isinstance(declared, NodeRegistry):
            registry.add_all(declared)
    return registry

"""The nodes, a module per domain. Adding one is a function and its declaration in one file.

Importing this package loads torch, so only a render process does it; others are told the declarations.
"""

from __future__ import annotations

from importlib import import_module

from comfyfleet.engine.registry import NodeRegistry

MODULES = ("images", "latents", "vae", "films", "sounds", "conditioning", "primitives")


def all_nodes() -> NodeRegistry:
    """Every node of this engine."""
    registry = NodeRegistry()
    for name in MODULES:
        registry.add_all(import_module(f"{__name__}.{name}").NODES)
    return registry

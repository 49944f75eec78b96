"""What this machine is, as a node of a fleet of one: its graphics cards, as their driver tells.

A machine without a driver says nothing of cards, and what it does not say no search is held against.
"""

from __future__ import annotations

import platform

from comfyfleet.control.fleet.base import FleetNode
from comfyfleet.gpu import gpu_facts

_GB = 1e9


def this_machine(address: str, slots: int) -> FleetNode:
    """slots: workers there is room for; a machine of unlike cards is known by its first. Blocking, milliseconds."""
    cards = gpu_facts()
    return FleetNode(
        name=platform.node(),
        address=address,
        is_alive=True,
        gpus=float(len(cards) or slots),
        gpu_name=cards[0].name if cards else "",
        gpu_ram_gb=round(min((card.memory_total_bytes for card in cards), default=0) / _GB, 1),
    )


def described(node: FleetNode) -> str:
    """ "1 x NVIDIA H200 with 150.1 GB", for whoever asked for something else."""
    if not node.gpu_name:
        return f"room for {node.gpus:g} workers and no graphics card that a driver knows"
    return f"{node.gpus:g} x {node.gpu_name} with {node.gpu_ram_gb:g} GB"

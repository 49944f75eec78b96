"""What this machine is, as a node of a fleet of one: its graphics cards, as their driver tells.

A machine without a driver says nothing of cards, and what it does not say no search is held against.
"""

from __future__ import annotations

import platform

from comfyfleet.control.fleet.base import FleetNode

_GB = 1e9


def this_machine(address: str, slots: int) -> FleetNode:
    """slots: workers there is room for; a machine of unlike cards is known by its first. Blocking, milliseconds."""
    names, sizes = _cards()
    return FleetNode(
        name=platform.node(),
        address=address,
        is_alive=True,
        gpus=float(len(names) or slots),
        gpu_name=names[0] if names else "",
        gpu_ram_gb=round(min(sizes) / _GB, 1) if sizes else 0.0,
    )


def described(node: FleetNode) -> str:
    """ "1 x NVIDIA H200 with 150.1 GB", for whoever asked for something else."""
    if not node.gpu_name:
        return f"room for {node.gpus:g} workers and no graphics card that a driver knows"
    return f"{node.gpus:g} x {node.gpu_name} with {node.gpu_ram_gb:g} GB"


def _cards() -> tuple[list[str], list[int]]:
    """(names, bytes of memory), empty without a driver (or the wheel that asks it)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
        sizes = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
    except ImportError:
        return [], []
    except pynvml.NVMLError:
        return [], []
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names], sizes

"""What a machine of a Ray cluster tells about itself by its environment, as `ray start` was given it.

`COMFYFLEET_DATA_DIR` (models, workers' folders), `COMFYFLEET_FIRST_SLOT` (for several nodes on one machine: the first
port number's tens), `COMFYFLEET_NODE_ADDRESS` (where workers are reached, when it is not the address Ray knows).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comfyfleet.settings.machine import default_data_dir

# Ray's own variables mean nothing to a worker; the devices are given to each by itself.
_NOT_INHERITED = ("RAY_", "CUDA_VISIBLE_DEVICES", "COMFYFLEET_LIFELINE")


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """inherited: what workers' processes start from. devices: the GPUs of the asking process, as Ray numbered them."""

    data_dir: Path
    first_slot: int
    address: str
    devices: tuple[str, ...]
    inherited: Mapping[str, str]


def node_settings(env: Mapping[str, str] | None = None) -> NodeSettings:
    """Of this very process unless an environment is given."""
    env = os.environ if env is None else env
    return NodeSettings(
        data_dir=default_data_dir(env).resolve(),
        first_slot=int(env.get("COMFYFLEET_FIRST_SLOT") or 0),
        address=env.get("COMFYFLEET_NODE_ADDRESS", ""),
        devices=tuple(part for part in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if part),
        inherited={name: value for name, value in env.items() if not name.startswith(_NOT_INHERITED)},
    )

"""From where to where an endpoint's and a workergroup's numbers may go: one table for the management API and for the
simulator's endpoint file, so that what was tried here is taken there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfyfleet.wire.errors import InvalidArguments

# field -> (lowest, highest); both allowed.
Bounds = dict[str, tuple[float, float]]
BOUNDS: Bounds = {
    "cold_workers": (0, 10_000),
    "max_workers": (0, 10_000),
    "min_load": (0, 1e12),
    "min_cold_load": (0, 1e12),
    "target_util": (0.01, 1.0),
    "cold_mult": (0, 1_000),
    "max_queue_time": (0, 86_400),
    "target_queue_time": (0, 86_400),
    "inactivity_timeout": (-1e9, 1e9),
    "gpu_ram": (0, 100_000),
    "test_workers": (0, 1_000),
}


def check_bounds(values: Mapping[str, Any], bounds: Bounds = BOUNDS) -> None:
    """Raises InvalidArguments naming the first field out of its range; NaN is in none."""
    for name, (lowest, highest) in bounds.items():
        value = values.get(name)
        if value is not None and not lowest <= value <= highest:
            raise InvalidArguments(f"{name} must be from {lowest:g} to {highest:g}, not {value:g}", field=name)

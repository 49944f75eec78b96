"""What a worker needs of a machine: its workergroup's search, held against what is known of a node. Pure.

Fields that a node says nothing about are not judged, except the price: who names a limit wants no unknown price. GPU
memory is in GB, as `search_params` has it; the word `any` and empty queries ask for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfyfleet.control.fleet.base import FleetNode

Search = Mapping[str, Mapping[str, Any]]

_VENDOR_WORDS = frozenset({"nvidia", "geforce", "amd"})
PRICE_FIELDS = ("dph_total", "dph", "price", "price_hour")


def gpus_wanted(search: Search) -> float:
    """GPUs to reserve: the least that the search allows, one unless it says otherwise."""
    return _least(search.get("num_gpus", {}), default=1.0)


def gpu_ram_wanted(search: Search) -> float:
    """GB to reserve of each GPU: the least that the search allows, 0 for any."""
    return _least(search.get("gpu_ram", {}), default=0.0)


def is_fit(search: Search, node: FleetNode) -> bool:
    """Whether a node may host such a worker, be it free or not."""
    known: dict[str, Any] = {
        "num_gpus": node.gpus,
        "gpu_ram": node.gpu_ram_gb or None,
        "gpu_name": node.gpu_name or None,
        **dict.fromkeys(PRICE_FIELDS, node.price_hour or None),
    }
    for field, clauses in search.items():
        value = known.get(field, _typed(node.labels.get(field)))
        if value is None:
            if field in PRICE_FIELDS:
                return False
            continue
        # "two GPUs" asks for room for two, not for a machine that has just two.
        if field == "num_gpus" and node.gpus < gpus_wanted(search):
            return False
        if field != "num_gpus" and not all(holds(value, operator, wanted) for operator, wanted in clauses.items()):
            return False
    return node.gpus >= gpus_wanted(search)


def _least(clauses: Mapping[str, Any], *, default: float) -> float:
    for operator in ("eq", "gte", "gt"):
        if isinstance(wanted := clauses.get(operator), int | float):
            return float(wanted)
    options = [option for option in clauses.get("in", ()) if isinstance(option, int | float)]
    return float(min(options)) if options else default


def holds(value: Any, operator: str, wanted: Any) -> bool:
    """One clause of a query, held against a value."""
    if operator in ("in", "notin"):
        options = wanted if isinstance(wanted, list | tuple) else [wanted]
        return any(_same(value, option) for option in options) is (operator == "in")
    if operator in ("eq", "neq"):
        return _same(value, wanted) is (operator == "eq")
    if not isinstance(value, int | float) or not isinstance(wanted, int | float):
        return False
    return {"gt": value > wanted, "gte": value >= wanted, "lt": value < wanted, "lte": value <= wanted}.get(
        operator, False
    )


def _same(value: Any, wanted: Any) -> bool:
    """Names as people type them: `RTX_4090`, `rtx-4090` and the driver's `NVIDIA GeForce RTX 4090` are one."""
    if isinstance(value, str) or isinstance(wanted, str):
        return _plain(value) == _plain(wanted)
    return bool(value == wanted)


def _plain(value: Any) -> str:
    words = str(value).replace("_", " ").replace("-", " ").lower().split()
    return " ".join(word for word in words if word not in _VENDOR_WORDS)


def _typed(text: str | None) -> Any:
    if text is None:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text

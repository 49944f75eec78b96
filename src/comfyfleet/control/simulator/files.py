"""The simulator's two TOML files: an endpoint's parameters, and the kinds of GPU that a fleet can have.

endpoint.toml holds the parameters under their public names, at the top level or under `[endpoint]`. fleet.toml holds
`[[gpu]]` tables: name, score (load/s), boot_s, wake_s, swap_s, price_hour, count (how many may exist at once), and
warm_models (how many models stay in memory).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from comfyfleet.control.scaling import ScalePolicy
from comfyfleet.wire.errors import BadRequest

T = TypeVar("T")


class GpuKind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of machine. Times in seconds, price in money per hour of GPU time."""

    name: str
    score: float
    boot_s: float = 120.0
    wake_s: float = 30.0
    swap_s: float = 15.0
    price_hour: float = 1.0
    count: int = 100
    warm_models: int = 1


class FleetFile(msgspec.Struct, frozen=True, kw_only=True):
    """All kinds, best price for performance first."""

    gpu: tuple[GpuKind, ...]


def read_endpoint(path: Path) -> ScalePolicy:
    """Raises BadRequest naming the key."""
    found = _toml(path)
    values = found.get("endpoint", found)
    known = set(ScalePolicy.__struct_fields__) - {"endpoint_id", "state"}
    if unknown := sorted(set(values) - known):
        raise BadRequest(f"{path}: unknown parameter {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return _convert(path, {"endpoint_id": 1, **values}, ScalePolicy)


def read_fleet(path: Path) -> FleetFile:
    """Raises BadRequest naming the key."""
    fleet = _convert(path, _toml(path), FleetFile)
    for kind in fleet.gpu:
        if kind.score <= 0 or kind.count < 0 or kind.warm_models < 1:
            raise BadRequest(f"{path}: gpu {kind.name!r} needs score > 0, count >= 0 and warm_models >= 1")
    if not fleet.gpu:
        raise BadRequest(f"{path}: there is no [[gpu]] table")
    return FleetFile(gpu=tuple(sorted(fleet.gpu, key=lambda kind: kind.price_hour / kind.score)))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise BadRequest(f"{path}: {error}") from error


def _convert(path: Path, value: Any, to: type[T]) -> T:
    try:
        return msgspec.convert(value, to, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{path}: {error}") from error

"""The simulator's two TOML files: an endpoint's parameters, and the kinds of GPU that a fleet can have.

endpoint.toml holds the parameters under their public names, at the top level or under `[endpoint]`, within the bounds
that the management API sets them. fleet.toml holds `[[gpu]]` tables: name, score (load/s), boot_s, wake_s, swap_s,
price_hour, count (how many may exist at once), and warm_models (how many models stay in memory).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from comfyfleet.control.bounds import BOUNDS, Bounds, check_bounds
from comfyfleet.control.scaling import ScalePolicy
from comfyfleet.wire.errors import BadRequest, InvalidArguments

T = TypeVar("T")

# From where to where the numbers of a kind may go; both allowed. A score divides, so it keeps away from 0.
_KIND_BOUNDS: Bounds = {
    "score": (1e-6, 1e12),
    "boot_s": (0, 1e9),
    "wake_s": (0, 1e9),
    "swap_s": (0, 1e9),
    "price_hour": (0, 1e9),
    "count": (0, 1_000_000),
    "warm_models": (1, 1_000_000),
}


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
    if not isinstance(values, dict):
        raise BadRequest(f"{path}: endpoint must be a table, [endpoint]")
    known = set(ScalePolicy.__struct_fields__) - {"endpoint_id", "state"}
    if unknown := sorted(set(values) - known):
        raise BadRequest(f"{path}: unknown parameter {unknown[0]!r}; there are {', '.join(sorted(known))}")
    policy = _convert(path, {"endpoint_id": 1, **values}, ScalePolicy)
    _check(f"{path}", policy, BOUNDS)
    return policy


def read_fleet(path: Path) -> FleetFile:
    """Raises BadRequest naming the key."""
    fleet = _convert(path, _toml(path), FleetFile)
    for kind in fleet.gpu:
        _check(f"{path}: gpu {kind.name!r}", kind, _KIND_BOUNDS)
    if not fleet.gpu:
        raise BadRequest(f"{path}: there is no [[gpu]] table")
    return FleetFile(gpu=tuple(sorted(fleet.gpu, key=lambda kind: kind.price_hour / kind.score)))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path}: this is not UTF-8") from error
    except ValueError as error:  # tomllib's own, or a number of thousands of digits
        raise BadRequest(f"{path}: {error}") from error


def _convert(path: Path, value: Any, to: type[T]) -> T:
    try:
        return msgspec.convert(value, to, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{path}: {error}") from error


def _check(where: str, values: msgspec.Struct, bounds: Bounds) -> None:
    try:
        check_bounds(msgspec.structs.asdict(values), bounds)
    except InvalidArguments as error:
        raise BadRequest(f"{where}: {error.message}") from error

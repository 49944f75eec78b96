"""LoRA files: low-rank changes of a model's weights, read from the layouts people publish.

W' = W + strength x (alpha / rank) x up down, where alpha is rank when the file names none (Hu et al. 2021). A file may
also hold whole differences: `.diff` of a weight, `.diff_b` of a bias. Names: lightx2v's
`diffusion_model.<module>.lora_down.weight`, PEFT's `lora_A/lora_B`, and for Stable Diffusion kohya's
`lora_unet_<module with underscores>` and `lora_te_…`.

On scaled-fp8 weights the pair stays apart (y += factor up(down(x))): exact, where merging would have to quantise again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import LowRank
from comfyfleet.wire.errors import ModelFileUnusable

DOWN = (
    ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", "_lora.down.weight", ".lora.down.weight",
    ".lora_A", ".lora_linear_layer.down.weight",
)  # fmt: skip
UP = (
    ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", "_lora.up.weight", ".lora.up.weight",
    ".lora_B", ".lora_linear_layer.up.weight",
)  # fmt: skip
MIDDLE = ".lora_mid.weight"
OTHER_KINDS = (".dora_scale", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".oft_blocks", ".oft_diag", ".a1.weight")
ENDINGS = (*DOWN, *UP, ".alpha", ".diff", ".diff_b")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A whole difference of a parameter, times `factor`."""

    value: Tensor
    factor: float


Change = LowRank | Difference


def delta(change: Change, like: Tensor) -> Tensor:
    """What a change adds to a parameter, float32, of `like`'s shape and device."""
    if isinstance(change, Difference):
        return change.value.to(device=like.device, dtype=torch.float32).reshape(like.shape) * change.factor
    up = change.up.to(device=like.device, dtype=torch.float32)
    down = change.down.to(device=like.device, dtype=torch.float32)
    return (up @ down).reshape(like.shape) * change.factor


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The changes of a model's parameters, in the order they were asked for; `key` names them."""

    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    key: str = ""

    def and_then(self, other: Patches) -> Patches:
        merged = dict(self.changes)
        for name, changes in other.changes.items():
            merged[name] = (*merged.get(name, ()), *changes)
        return Patches(changes=merged, key=self.key + other.key)

    def of(self, name: str) -> tuple[Change, ...]:
        return self.changes.get(name, ())

    def apply(self, name: str, value: Tensor) -> Tensor:
        """`value` (float32) with all its changes."""
        for change in self.of(name):
            value = value + delta(change, value)
        return value


NO_PATCHES = Patches()


def read_lora(checkpoint: Checkpoint, model: Checkpoint, names: Mapping[str, str], strength: float) -> Patches:
    """The changes of one LoRA file for a model: `names` is the LoRA's word for a parameter -> the parameter in `model`.

    Modules of the file that are not in `names` belong to another model (a LoRA for model and text encoder) or to
    another family; the caller decides what no match at all means. Raises ModelFileUnusable for other kinds of adapter
    and for a LoRA of a model of another size.
    """
    odd = next((name for name in checkpoint if name.endswith(OTHER_KINDS)), None)
    if odd is not None:
        file = Path(checkpoint.path).name
        raise ModelFileUnusable(
            f"{file} is a LoHa, LoKr, OFT or DoRA adapter; only LoRA is known", file=file, tensor=odd
        )
    changes: dict[str, tuple[Change, ...]] = {}
    for module in sorted({_module(name) for name in checkpoint if name.endswith(ENDINGS)}):
        target = names.get(module)
        if target is None:
            continue
        down, up = _first(checkpoint, module, DOWN), _first(checkpoint, module, UP)
        if down is not None and up is not None:
            rank = down.shape[0]
            if f"{module}{MIDDLE}" in checkpoint:
                down = _through_middle(down, checkpoint.tensor(f"{module}{MIDDLE}"))
            alpha = checkpoint.tensor(f"{module}.alpha").item() if f"{module}.alpha" in checkpoint else rank
            pair = LowRank(down=down.flatten(1), up=up.flatten(1), factor=strength * float(alpha) / rank)
            _check_size(checkpoint, model, target, pair.up.shape[0] * pair.down.shape[1])
            changes[target] = (*changes.get(target, ()), pair)
        for ending, parameter in ((".diff", target), (".diff_b", target.removesuffix(".weight") + ".bias")):
            if f"{module}{ending}" in checkpoint:
                whole = Difference(value=checkpoint.tensor(f"{module}{ending}"), factor=strength)
                _check_size(checkpoint, model, parameter, whole.value.numel())
                changes[parameter] = (*changes.get(parameter, ()), whole)
    return Patches(changes=changes, key=f"|{checkpoint.key}x{strength!r}" if changes else "")


def module_names(parameters: Iterable[str], dotted: Iterable[str], underscored: Iterable[str]) -> dict[str, str]:
    """Every name under which a LoRA file may speak of a model's parameters -> the parameter.

    dotted: prefixes before the name as it is ("diffusion_model."); underscored: before the name with "_" for ".".
    A parameter that is no `.weight` or `.bias` (a modulation table) goes by its whole name.
    """
    plain = {name.removesuffix(".weight"): name for name in parameters if not name.endswith((".bias", ".scale_weight"))}
    names = {f"{prefix}{module}": name for prefix in dotted for module, name in plain.items()}
    names |= {prefix + module.replace(".", "_"): name for prefix in underscored for module, name in plain.items()}
    return names


def _through_middle(down: Tensor, middle: Tensor) -> Tensor:
    """A convolution's pair with a core between: down (r, in, 1, 1), middle (r, r, kh, kw) -> (r, in, kh, kw).

    Source: Yeh et al. 2023 (LyCORIS), the Tucker form of LoCon.
    """
    return torch.einsum("orhw,ri->oihw", middle.float(), down.flatten(1).float())


def _check_size(checkpoint: Checkpoint, model: Checkpoint, parameter: str, found: int) -> None:
    needed = math.prod(model.shape(parameter))
    if found != needed:
        file = Path(checkpoint.path).name
        raise ModelFileUnusable(
            f"{file} is a LoRA for a model of another size: {parameter} has {needed} numbers, not {found}",
            file=file,
            tensor=parameter,
        )


def _module(name: str) -> str:
    for ending in ENDINGS:
        if name.endswith(ending):
            return name[: -len(ending)]
    return name


def _first(checkpoint: Checkpoint, module: str, endings: tuple[str, ...]) -> Tensor | None:
    for ending in endings:
        if module + ending in checkpoint:
            return checkpoint.tensor(module + ending)
    return None

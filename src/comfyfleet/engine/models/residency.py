"""Where weights live and in which dtype, and filling modules from files.

A network is built when first used and dropped when moved off: the file stays mapped, so "moving to the CPU" frees the
device and copies nothing. Policy, in one place:

- CPU: computes in float32. A small model is widened to float32 once; a big one stays as stored (mapped, no second
  copy) and is cast layer by layer at each call.
- CUDA: computes in the family's own dtype (half precision, but float32 for text encoders, as ComfyUI does). Weights
  stored narrower than that stay as stored and are cast per call; all others are cast once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.compiling import compile_blocks
from comfyfleet.engine.models.layers import Embedding, Linear, LowRank
from comfyfleet.engine.models.lora import NO_PATCHES, Change, Difference, Patches
from comfyfleet.wire.errors import ModelFileUnusable

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How one kind of network computes.

    on_cuda: the dtype it computes in there. round_to: weights are rounded to this dtype first, whatever the device
    (ComfyUI holds some text encoders in fp16 even on the CPU). fp8_bias: biases of scaled-fp8 Linears are rounded to
    e4m3, as ComfyUI, which builds the whole Linear in fp8, does for diffusion models.
    """

    on_cuda: torch.dtype
    round_to: torch.dtype | None = None
    fp8_bias: bool = False
    never_rounded: tuple[str, ...] = ()  # beginnings of the names of parameters that `round_to` leaves alone
    widen_limit_bytes: int = 2 * 2**30  # on the CPU, models up to this size in float32 are widened once

    def compute_dtype(self, device: str) -> torch.dtype:
        return self.on_cuda if device.startswith("cuda") else torch.float32


def fill(module: nn.Module, source: Checkpoint, device: str, precision: Precision, patches: Patches) -> None:
    """Give every parameter of `module` its tensor from `source`, patched. Raises ModelFileUnusable."""
    parameters = dict(module.named_parameters())
    _check_names(parameters, source)
    on_cuda = device.startswith("cuda")
    small = sum(each.numel() for each in parameters.values()) * 4 <= precision.widen_limit_bytes
    compute = precision.compute_dtype(device)
    for path, layer in module.named_modules():
        for name, _ in list(layer.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            value = _rounded(source.tensor(full), path, name, source, precision)
            if isinstance(layer, Linear) and name == "weight":
                scale = f"{path}.scale_weight"
                if scale in source:
                    layer.scale = source.tensor(scale).reshape(()).to(device=device, dtype=torch.float32)
                keeps = value.dtype.itemsize < compute.itemsize if on_cuda else not small
                if keeps and not any(isinstance(change, Difference) for change in patches.of(full)):
                    layer.low_ranks = tuple(_placed(pair, device) for pair in patches.of(full))
                    _put(layer, name, value.to(device))
                    continue
            if isinstance(layer, Embedding) and on_cuda:
                value = value.to(device)  # a table of a million rows: its users cast the few they take
            elif on_cuda or small or patches.of(full):
                value = value.to(device=device, dtype=torch.float32)
                if isinstance(layer, Linear) and name == "weight" and layer.scale is not None:
                    value, layer.scale = value * layer.scale, None
                value = patches.apply(full, value)
                if patches.of(full) and precision.round_to in (torch.float16, torch.bfloat16):
                    value = value.to(precision.round_to)  # where weights are held in half, so are patched ones
                value = value.to(compute)
            _put(layer, name, value)
    module.eval()


def _put(layer: nn.Module, name: str, value: Tensor) -> None:
    setattr(layer, name, nn.Parameter(value, requires_grad=False))


def _check_names(parameters: dict[str, nn.Parameter], source: Checkpoint) -> None:
    file = Path(source.path).name
    missing = [name for name in parameters if name not in source]
    if missing:
        raise ModelFileUnusable(
            f"{file} lacks {len(missing)} tensors, first {missing[0]}", file=file, missing=missing[:8]
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != source.shape(name):
            raise ModelFileUnusable(
                f"{file}: {name} has shape {list(source.shape(name))}, {list(parameter.shape)} is needed",
                file=file,
                tensor=name,
            )


def _rounded(stored: Tensor, path: str, name: str, source: Checkpoint, precision: Precision) -> Tensor:
    weight_name = f"{path}.weight"
    if precision.fp8_bias and name == "bias" and f"{path}.scale_weight" in source and source.dtype(weight_name) in FP8:
        return stored.float().to(torch.float8_e4m3fn).float()
    if precision.round_to is not None and stored.dtype not in FP8 and not path.startswith(precision.never_rounded):
        return stored.to(precision.round_to)
    return stored


def _placed(pair: Change, device: str) -> LowRank:
    if not isinstance(pair, LowRank):
        raise TypeError("a whole difference cannot stay apart")
    return LowRank(down=pair.down.to(device), up=pair.up.to(device), factor=pair.factor)


@dataclass(frozen=True, kw_only=True)
class Source(Generic[Network]):
    """All that is needed to build a network at any time, on any device."""

    checkpoint: Checkpoint
    build: Callable[[Checkpoint], Network]  # from shapes alone: parameters are on "meta"
    precision: Precision
    patches: Patches = NO_PATCHES

    @property
    def key(self) -> str:
        rounding = f"|{self.precision.round_to}" if self.precision.round_to is not None else ""
        return self.checkpoint.key + rounding + self.patches.key


class Resident(Generic[Network]):
    """A network that is in its file until asked for; `move_to` decides where it will be."""

    def __init__(self, source: Source[Network], device: str = "cpu") -> None:
        self.source, self.device = source, device
        self.is_pinned = False  # the user asked for this device: nobody moves it
        self.size_bytes = source.checkpoint.size_bytes
        self._network: Network | None = None
        self._compile_backend: str | None = None

    @property
    def key(self) -> str:
        return self.source.key

    @property
    def dtype(self) -> torch.dtype:
        return self.source.precision.compute_dtype(self.device)

    def network(self) -> Network:
        """The network on its device, filled now if it is not there yet."""
        if self._network is None:
            network = self.source.build(self.source.checkpoint)
            fill(network, self.source.checkpoint, self.device, self.source.precision, self.source.patches)
            if self._compile_backend is not None:
                compile_blocks(network, self._compile_backend)
            self._network = network
        return self._network

    def compile_with(self, backend: str) -> None:
        """Run the network's repeated blocks compiled from now on (`compiling.py`)."""
        if backend != self._compile_backend:
            self._compile_backend = backend
            if self._network is not None:
                compile_blocks(self._network, backend)

    def move_to(self, device: str) -> None:
        if device != self.device and not self.is_pinned:
            self._network, self.device = None, device

    def free(self) -> None:
        """Forget the weights; the next use reads them from the file again."""
        self._network = None

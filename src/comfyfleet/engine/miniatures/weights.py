"""Collecting a miniature's tensors by name: random kernels that keep the size of what passes, norms, scaled fp8."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3_LARGEST = 448.0

Tensors = dict[str, Tensor]


class Weights:
    """Named tensors of one file. `under` is the same collection behind a longer prefix."""

    def __init__(self, seed: int, tensors: Tensors | None = None, prefix: str = "") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {} if tensors is None else tensors
        self.prefix = prefix

    def under(self, prefix: str) -> Weights:
        below = Weights(0, self.tensors, self.prefix + prefix)
        below.generator = self.generator
        return below

    def put(self, name: str, tensor: Tensor) -> None:
        self.tensors[self.prefix + name] = tensor.contiguous()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def kernel(self, name: str, *shape: int, gain: float = 1.0, bias: bool = True) -> None:
        """A weight (outputs, inputs, …) that keeps the deviation of its input, times `gain`; a bias of zeros."""
        self.put(f"{name}.weight", self.normal(*shape) * gain / math.sqrt(math.prod(shape[1:])))
        if bias:
            self.put(f"{name}.bias", torch.zeros(shape[0]))

    def norm(self, name: str, width: int, *, bias: bool = True) -> None:
        self.put(f"{name}.weight", torch.ones(width))
        if bias:
            self.put(f"{name}.bias", torch.zeros(width))


def as_scaled_fp8(tensors: Tensors, *, keep: tuple[str, ...] = (), marker_length: int) -> Tensors:
    """Every matrix `X.weight` as e4m3 with `X.scale_weight` (float32, [1]), as the published fp8-scaled files.

    keep: names containing one of these stay as they are. marker_length: elements of the `scaled_fp8` marker.
    """
    stored: Tensors = {"scaled_fp8": torch.zeros(marker_length, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not name.endswith(".weight") or any(part in name for part in keep):
            stored[name] = tensor
            continue
        scale = (tensor.abs().max() / E4M3_LARGEST).clamp(min=1e-12).float()
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix(".weight") + ".scale_weight"] = scale.reshape(1)
    return stored


def halved(tensors: Tensors) -> Tensors:
    """Floating tensors in float16, as the published fp16 files."""
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

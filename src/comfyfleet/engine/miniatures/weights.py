"""Collecting a miniature's tensors by name: random kernels that keep the size of what passes, norms, scaled fp8."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3_LARGEST = 448.0
SILU_MEAN = 0.2  # of what leaves a norm and SiLU

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

    def smooth(self, name: str, outputs: int, inputs: int, *sides: int, gain: float = 1.0, mean: float = 0.0) -> None:
        """A kernel that mixes channels evenly and blurs along every axis: binomial weights, which sum to one.

        mean: of its inputs; the bias takes it away, so that what follows is centred.
        """
        mixing = torch.linalg.qr(self.normal(max(outputs, inputs), min(outputs, inputs)))[0]
        mixing = (mixing if outputs >= inputs else mixing.T) * gain * max(1.0, (outputs / inputs) ** 0.5)
        self.put(f"{name}.weight", torch.einsum("oi,...->oi...", mixing, _binomial(sides)))
        self.put(f"{name}.bias", -mean * mixing.sum(dim=1))

    def norm(self, name: str, width: int, *, bias: bool = True) -> None:
        self.put(f"{name}.weight", torch.ones(width))
        if bias:
            self.put(f"{name}.bias", torch.zeros(width))


def _binomial(sides: tuple[int, ...]) -> Tensor:
    """Outer product of the rows of Pascal's triangle: (1, 2, 1) / 4 for a side of 3."""
    blur = torch.ones(())
    for side in sides:
        row = torch.tensor([math.comb(side - 1, place) for place in range(side)]) / 2.0 ** (side - 1)
        blur = blur[..., None] * row
    return blur


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

"""Layers whose weights stay in the file's dtype and are cast to the input's dtype at each call.

Modules are named exactly as the published files name them, so filling one is a look-up, never a renaming. Three things
make these differ from torch.nn: no weight is allocated or initialised on construction (they come from a file), a Linear
may hold a scaled-fp8 weight (true weight = stored x scale), and it may carry LoRA pairs beside its weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def empty(*shape: int) -> nn.Parameter:
    """A parameter without memory, to be filled from a file."""
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


def cast(weight: Tensor | None, like: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(dtype=like.dtype)


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A LoRA beside a Linear: y += factor x up(down(x)). down: (rank, in), up: (out, rank)."""

    down: Tensor
    up: Tensor
    factor: float


class Linear(nn.Module):
    """y = x W^T + b. weight: (out, in), any float dtype; scale: the scale of an fp8 weight, or None."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = empty(outputs, inputs)
        self.bias = empty(outputs) if bias else None
        self.scale: Tensor | None = None
        self.low_ranks: tuple[LowRank, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.scale is not None:
            weight = weight * self.scale.to(x.dtype)
        y = F.linear(x, weight, cast(self.bias, x))
        for pair in self.low_ranks:
            y = y + F.linear(F.linear(x, pair.down.to(x.dtype)), pair.up.to(x.dtype)) * pair.factor
        return y


class Conv(nn.Module):
    """Convolution over 1, 2 or 3 axes, by the kernel's rank; `pad` and `stride` as in torch."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, ...], *, stride: int = 1, pad: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = empty(outputs, inputs, *kernel)
        self.bias = empty(outputs) if bias else None
        self.stride, self.pad = stride, pad
        self.function = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight.to(x.dtype), cast(self.bias, x), self.stride, self.pad)


class LayerNorm(nn.Module):
    """Over the last axis; `affine` False has no weights."""

    def __init__(self, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = empty(width) if affine else None
        self.bias = empty(width) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), cast(self.weight, x), cast(self.bias, x), self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = empty(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight.to(x.dtype), self.eps)


class GroupNorm(nn.Module):
    """Over `groups` groups of channels (axis 1)."""

    def __init__(self, width: int, eps: float, groups: int = 32) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = empty(width), empty(width)

    def forward(self, x: Tensor) -> Tensor:
        # Not F.group_norm, which refuses one value a group as if it were training.
        return torch.group_norm(x, self.groups, cast(self.weight, x), cast(self.bias, x), self.eps)


class Embedding(nn.Module):
    """Rows of a table. The result has the table's dtype; callers cast."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = empty(rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


# On Hopper and later cuDNN's kernel is the fastest exact one for half precision; it refuses what it cannot do, and the
# next one is taken. Elsewhere PyTorch's own order holds.
HOPPER = (9, 0)
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fastest_attention(device: str, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The order of attention kernels for a network's call; entered outside of what is compiled."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    if device.startswith("cuda") and is_half and torch.cuda.get_device_capability(device) >= HOPPER:
        return sdpa_kernel(BACKENDS, set_priority=True)
    return nullcontext()


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v by PyTorch's SDPA. q: (B, n, heads d); k, v: (B, m, heads d) -> q's shape."""
    batch = q.shape[0]
    q, k, v = (each.view(batch, -1, heads, each.shape[-1] // heads).transpose(1, 2) for each in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).reshape(batch, -1, heads * mixed.shape[-1])

"""Arithmetic of the film autoencoder: causal convolutions with memory, per-frame convolutions, the channel norm.

On the CPU the same sums are computed by another road, because PyTorch sends small float32 Conv3d to a slow kernel and
reduces short channel axes slowly (measured: 45 s became 12 s for 81 frames of 640 x 640): oneDNN's convolution is
called by name, tensors are channels-last, and the norm sums squares by a small matrix product.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.layers import empty

NORM_EPS = 1e-12
BLOCK_COLUMNS = 32  # the norm's matrix product takes this many numbers at once


class Memory:
    """What the layers of one film remember between its parts."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}
        self._begun: set[nn.Module] = set()

    def with_past(self, layer: nn.Module, x: Tensor, window: int) -> Tensor:
        """x (B, C, t, h, w) behind the last `window` frames this layer saw, zeros before the film; and remember."""
        past = self._frames.get(layer)
        if past is None:
            past = torch.zeros_like(x[:, :, :1]).expand(-1, -1, window, -1, -1)
        if on_cpu_road(x):  # `cat` keeps a layout only where all its inputs have it
            past, x = channels_last(past), channels_last(x)
        joined = torch.cat([past, x], dim=2)
        self.remember(layer, joined[:, :, -window:])
        return joined

    def recall(self, layer: nn.Module, place: Tensor) -> None:
        """Write the last frames this layer saw to `place` (B, C, window, h, w); zeros before the film."""
        past = self._frames.get(layer)
        place.zero_() if past is None else place.copy_(past)

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        self._frames[layer] = frames.clone()  # a copy: a view would keep the whole part alive

    @property
    def size_bytes(self) -> int:
        return sum(frames.untyped_storage().nbytes() for frames in self._frames.values())

    def has_begun(self, layer: nn.Module) -> bool:
        return layer in self._begun

    def begin(self, layer: nn.Module) -> None:
        self._begun.add(layer)


class CausalConv(nn.Module):
    """A convolution over (time, height, width) that sees the past only. `window`: how many past frames it sees.

    Space is padded to keep its size; time is not strided unless `stride` says so.
    """

    def __init__(self, shape: tuple[int, ...], stride: int = 1, window: int | None = None) -> None:
        super().__init__()
        self.weight, self.bias = empty(*shape), empty(shape[0])
        self.stride = (stride, 1, 1)
        self.pad = (0, shape[3] // 2, shape[4] // 2)
        self.window = shape[2] - 1 if window is None else window

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.window:
            x = memory.with_past(self, x, self.window)
        return convolve(x, self.weight, self.bias, self.pad, self.stride)


def norm_then_conv(norm: RmsNorm, conv: CausalConv, x: Tensor, memory: Memory) -> Tensor:
    """conv(SiLU(norm(x))), the two in every residual block; on the CPU's road the norm writes straight behind the past.

    That saves a pass over the whole feature map, which joining past and present would cost.
    """
    last = x.permute(0, 2, 3, 4, 1)  # (B, t, h, w, C)
    if not (on_cpu_road(x) and last.is_contiguous() and x.shape[0] == 1 and conv.window):
        return conv(norm(x, silu=True), memory)
    joined = x.new_empty(1, conv.window + x.shape[2], *last.shape[2:])
    memory.recall(conv, joined[:, : conv.window].permute(0, 4, 1, 2, 3))
    F.silu(_normed_rows(last, norm.scaled_gamma(x), out=joined[:, conv.window :]), inplace=True)
    film = joined.permute(0, 4, 1, 2, 3)
    memory.remember(conv, film[:, :, -conv.window :])
    return convolve(film, conv.weight, conv.bias, conv.pad, conv.stride)


class FrameConv(nn.Module):
    """A convolution over height and width. x: (frames, C, h, w)."""

    def __init__(self, shape: tuple[int, ...], stride: int = 1, pad: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = empty(*shape), empty(shape[0])
        self.stride, self.pad = (stride, stride), (pad, pad)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.pad, self.stride)


class RmsNorm(nn.Module):
    """x / ||x|| x sqrt(C) x gamma over the channels (axis 1), then SiLU if asked."""

    def __init__(self, width: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = empty(width, *[1] * axes)

    def forward(self, x: Tensor, *, silu: bool) -> Tensor:
        gamma = self.scaled_gamma(x)
        last = x.permute(0, 2, 3, 4, 1)  # (B, t, h, w, C)
        if on_cpu_road(x) and last.is_contiguous():
            y = _normed_rows(last, gamma).permute(0, 4, 1, 2, 3)
        else:
            y = F.normalize(x, dim=1, eps=NORM_EPS) * gamma.view(-1, 1, 1, 1)
        return F.silu(y, inplace=True) if silu else y

    def scaled_gamma(self, x: Tensor) -> Tensor:
        """sqrt(C) x gamma, (C,)."""
        return self.gamma.flatten().to(x.dtype) * x.shape[1] ** 0.5


def _normed_rows(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """x: (…, C), contiguous -> x / ||x|| x gamma, written to `out` if given. Short rows are taken several at a time."""
    width = x.shape[-1]
    together = max(1, BLOCK_COLUMNS // width)
    if x.numel() % (width * together):
        together = 1
    rows = x.reshape(-1, width * together)
    result = torch.empty_like(rows) if out is None else out.view(rows.shape)
    torch.mul(rows, rows, out=result)
    if width >= BLOCK_COLUMNS:
        inverse = result.sum(dim=1, keepdim=True)
    else:
        inverse = result @ _sum_within(width, together)
    torch.mul(rows, inverse.clamp_(min=NORM_EPS**2).rsqrt_(), out=result)
    return result.mul_(gamma.repeat(together)).view(x.shape)


@functools.lru_cache(maxsize=16)
def _sum_within(width: int, together: int) -> Tensor:
    """A block-diagonal matrix of ones: squares @ it puts each row's sum at each of its places."""
    return torch.block_diag(*[torch.ones(width, width)] * together)


def on_cpu_road(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def channels_last(x: Tensor) -> Tensor:
    """The same numbers, channels innermost in memory."""
    return x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, pad: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """F.conv2d or F.conv3d by the weight's rank, taking oneDNN's road on the CPU."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    ones = (1,) * len(stride)
    if on_cpu_road(x):
        if weight[0, 0].numel() == 1 and stride == ones:  # one place at a time: a matrix product, layout kept
            return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
        return torch.mkldnn_convolution(channels_last(x), channels_last(weight), bias, pad, stride, ones, 1)
    return (F.conv3d if x.dim() == 5 else F.conv2d)(x, weight, bias, stride, pad)


def frames_split(x: Tensor) -> Tensor:
    """(B, C, t, h, w) -> (B t, C, h, w)."""
    batch, channels, frames, height, width = x.shape
    return x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)


def frames_joined(x: Tensor, batch: int) -> Tensor:
    """(B t, C, h, w) -> (B, C, t, h, w)."""
    return x.view(batch, -1, *x.shape[1:]).permute(0, 2, 1, 3, 4)

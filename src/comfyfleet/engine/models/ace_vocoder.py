"""ACE-Step v1's vocoder: log-mel spectrograms to a waveform, 512 samples a frame (ADaMoS HiFi-GAN).

A ConvNeXt backbone (1-d) refines the frames, a HiFi-GAN generator with SiLU in place of leaky ReLU upsamples them.
Every size is read from shapes: an upsampling step multiplies by half its kernel, residual blocks dilate by 1, 3, 5.
Weights are stored as magnitude and direction (weight normalisation); they are multiplied out once, on first use.

Sources: Kong et al. 2020 (HiFi-GAN, V1); Liu et al. 2022 (ConvNeXt); Salimans & Kingma 2016 (weight normalisation).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import LayerNorm, Linear, cast, empty
from comfyfleet.engine.models.windows import in_windows

DILATIONS = (1, 3, 5)
NORM_EPS = 1e-6
BACKBONE_WINDOW_FRAMES = 4096
# On a CPU more is slower, as the work no longer stays in its caches, while a window's margins stay small beside it.
CPU_HEAD_WINDOW_FRAMES, CPU_HEAD_WINDOW_REACHES = 256, 16
GPU_HEAD_WINDOW_FRAMES = 4096


def over_channels(norm: LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over axis 1 of (B, channels, frames)."""
    return norm(x.transpose(1, 2)).transpose(1, 2)


class Kernel1d(nn.Module):
    """A plain convolution's weights."""

    def __init__(self, outputs: int, inputs: int, extent: int) -> None:
        super().__init__()
        self.weight, self.bias = empty(outputs, inputs, extent), empty(outputs)


class NormedKernel1d(nn.Module):
    """Weights as stored: `original0` the magnitude per row (axis 0), `original1` the direction."""

    def __init__(self, rows: int, columns: int, extent: int, biases: int) -> None:
        super().__init__()
        self.bias = empty(biases)
        self.parametrizations = nn.Module()
        self.parametrizations.weight = nn.Module()
        self.parametrizations.weight.original0 = empty(rows, 1, 1)
        self.parametrizations.weight.original1 = empty(rows, columns, extent)
        self._product: Tensor | None = None

    @staticmethod
    def of(section: Checkpoint, name: str) -> NormedKernel1d:
        rows, columns, extent = section.shape(f"{name}.parametrizations.weight.original1")
        return NormedKernel1d(rows, columns, extent, section.shape(f"{name}.bias")[0])

    def weight(self, like: Tensor) -> Tensor:
        """magnitude * direction / |direction|, kept; a plain attribute, so it is no parameter of the file."""
        if self._product is None:
            stored = self.parametrizations.weight
            direction = stored.original1.float()
            length = direction.flatten(1).norm(dim=1)[:, None, None]
            self._product = (direction * (stored.original0.float() / length)).to(like.dtype)
        return self._product

    def convolve(self, x: Tensor, dilation: int = 1) -> Tensor:
        """Same-length convolution."""
        weight = self.weight(x)
        pad = (weight.shape[-1] - 1) * dilation // 2
        return F.conv1d(x, weight, cast(self.bias, x), padding=pad, dilation=dilation)


class ConvNextBlock(nn.Module):
    def __init__(self, width: int, hidden: int, extent: int) -> None:
        super().__init__()
        self.width = width
        self.dwconv = Kernel1d(width, 1, extent)
        self.norm = LayerNorm(width, NORM_EPS)
        self.pwconv1 = Linear(width, hidden)
        self.pwconv2 = Linear(hidden, width)
        self.gamma = empty(width)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dwconv.weight.to(x.dtype)
        y = F.conv1d(x, weight, cast(self.dwconv.bias, x), padding=weight.shape[-1] // 2, groups=self.width)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y.transpose(1, 2)))))  # (B, frames, width)
        return x + (self.gamma.to(x.dtype) * y).transpose(1, 2)


class Backbone(nn.Module):
    """(B, mels, frames) -> (B, features, frames). Stages change the width by a 1x1 convolution between them."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        width, mels, extent = section.shape("channel_layers.0.0.weight")
        stages = section.count("stages.{}.")
        widths = [section.shape(f"stages.{stage}.0.dwconv.bias")[0] for stage in range(stages)]
        entries: list[nn.Module] = [nn.ModuleList([Kernel1d(width, mels, extent), LayerNorm(width, NORM_EPS)])]
        for before, after in pairwise(widths):
            entries.append(nn.ModuleList([LayerNorm(before, NORM_EPS), Kernel1d(after, before, 1)]))
        self.channel_layers = nn.ModuleList(entries)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ConvNextBlock(
                    widths[stage],
                    section.shape(f"stages.{stage}.{block}.pwconv1.weight")[0],
                    section.shape(f"stages.{stage}.{block}.dwconv.weight")[2],
                )
                for block in range(section.count(f"stages.{stage}.{{}}."))
            )
            for stage in range(stages)
        )
        self.norm = LayerNorm(widths[-1], NORM_EPS)
        blocks = [block for stage in self.stages for block in stage]
        self.reach = extent // 2 + sum(block.dwconv.weight.shape[-1] // 2 for block in blocks)

    def forward(self, mel: Tensor) -> Tensor:
        first, first_norm = self.channel_layers[0]
        pad = first.weight.shape[-1] // 2
        x = F.conv1d(F.pad(mel, (pad, pad), mode="replicate"), first.weight.to(mel.dtype), cast(first.bias, mel))
        x = over_channels(first_norm, x)
        for number, stage in enumerate(self.stages):
            if number:
                norm, change = self.channel_layers[number]
                x = F.conv1d(over_channels(norm, x), change.weight.to(x.dtype), cast(change.bias, x))
            for block in stage:
                x = block(x)
        return over_channels(self.norm, x)


class ResidualBlock(nn.Module):
    """Three times: SiLU, dilated convolution, SiLU, convolution, added to the input."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(NormedKernel1d.of(section, f"convs1.{n}") for n in range(len(DILATIONS)))
        self.convs2 = nn.ModuleList(NormedKernel1d.of(section, f"convs2.{n}") for n in range(len(DILATIONS)))
        extent = section.shape("convs1.0.parametrizations.weight.original1")[2]
        self.reach = sum((extent - 1) * (dilation + 1) // 2 for dilation in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        for dilation, wide, narrow in zip(DILATIONS, self.convs1, self.convs2, strict=True):
            x = x + narrow.convolve(F.silu(wide.convolve(F.silu(x), dilation)))
        return x


class Head(nn.Module):
    """(B, features, frames) -> (B, 1, frames * 512): the HiFi-GAN generator."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.conv_pre = NormedKernel1d.of(section, "conv_pre")
        self.conv_post = NormedKernel1d.of(section, "conv_post")
        steps = section.count("ups.{}.")
        self.ups = nn.ModuleList(NormedKernel1d.of(section, f"ups.{step}") for step in range(steps))
        blocks = section.count("resblocks.{}.")
        self.blocks_per_step = blocks // steps
        self.resblocks = nn.ModuleList(ResidualBlock(section.section(f"resblocks.{n}.")) for n in range(blocks))
        self.rates = [up.parametrizations.weight.original1.shape[-1] // 2 for up in self.ups]
        self.factor, self.reach = self._geometry()

    def _geometry(self) -> tuple[int, int]:
        """Samples per frame, and how many frames on each side a sample sees."""
        factor, frames = 1, float(self.conv_pre.parametrizations.weight.original1.shape[-1] // 2)
        for step, rate in enumerate(self.rates):
            frames += 2 / factor  # a transposed convolution of twice its rate sees two inputs, one on each side
            factor *= rate
            blocks = self.resblocks[step * self.blocks_per_step : (step + 1) * self.blocks_per_step]
            frames += max(block.reach for block in blocks) / factor
        frames += self.conv_post.parametrizations.weight.original1.shape[-1] // 2 / factor
        return factor, int(frames) + 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre.convolve(x)
        for step, (up, rate) in enumerate(zip(self.ups, self.rates, strict=True)):
            weight = up.weight(x)
            pad = (weight.shape[-1] - rate) // 2
            x = F.conv_transpose1d(F.silu(x), weight, cast(up.bias, x), stride=rate, padding=pad)
            first = step * self.blocks_per_step
            total = self.resblocks[first](x)
            for block in self.resblocks[first + 1 : first + self.blocks_per_step]:
                total = total + block(x)
            x = total / self.blocks_per_step
        return torch.tanh(self.conv_post.convolve(F.silu(x)))


class AceVocoder(nn.Module):
    """(n, mels, frames) log-mel -> (n, frames * 512) in [-1, 1], windows of frames at a time."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.backbone = Backbone(section.section("backbone."))
        self.head = Head(section.section("head."))

    def windows(
        self, mel: Tensor, backbone_window: int = BACKBONE_WINDOW_FRAMES, head_window: int | None = None
    ) -> Iterator[Tensor]:
        """The waveform in pieces along time, (n, samples) each. Windows are in frames; None: what suits the device."""
        refined = in_windows(self.backbone, mel, window=backbone_window, reach=self.backbone.reach, factor=1)
        features = torch.cat(list(refined), dim=-1)
        reach, factor = self.head.reach, self.head.factor
        if head_window is None:
            for_cpu = max(CPU_HEAD_WINDOW_FRAMES, CPU_HEAD_WINDOW_REACHES * reach)
            head_window = for_cpu if mel.device.type == "cpu" else GPU_HEAD_WINDOW_FRAMES
        for piece in in_windows(self.head, features, window=head_window, reach=reach, factor=factor):
            yield piece[:, 0]

    def forward(
        self, mel: Tensor, backbone_window: int = BACKBONE_WINDOW_FRAMES, head_window: int | None = None
    ) -> Tensor:
        return torch.cat(list(self.windows(mel, backbone_window, head_window)), dim=-1)

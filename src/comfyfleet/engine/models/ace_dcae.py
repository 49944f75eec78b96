"""ACE-Step v1's deep-compression autoencoder (DCAE): spectrograms (B, 2, 128, 8n) to latents (B, 8, 16, n) and back.

Residual blocks at the fine levels, blocks with multi-scale linear attention at the coarsest, and shortcuts that carry
pixels into channels and back (no parameters). What a block is, and all its sizes, its tensors' names and shapes tell.
The attention sees the whole length, so the coarsest level runs in one piece; the levels above run in windows.

Sources: Chen et al. 2024 (DC-AE, arXiv 2410.10733); Cai et al. 2023 (EfficientViT, arXiv 2205.14756).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import Conv, Linear, cast, empty
from comfyfleet.engine.models.windows import in_windows

HEAD_WIDTH = 32
NORM_EPS = 1e-5
DECODE_WINDOW_COLUMNS = 64  # latent columns decoded at a time above the coarsest level


class ChannelNorm(nn.Module):
    """Root-mean-square norm over axis 1 of (B, channels, rows, columns), with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = empty(width), empty(width)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + NORM_EPS).to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype)[:, None, None], x * scale, self.weight.to(x.dtype)[:, None, None])


class ResBlock(nn.Module):
    reach = 2  # two 3x3 convolutions

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        outputs, inputs = section.shape("conv2.weight")[:2]
        self.conv1 = Conv(inputs, inputs, (3, 3), pad=1)
        self.conv2 = Conv(inputs, outputs, (3, 3), pad=1, bias=False)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(F.silu(self.conv1(x)))) + x


class DepthKernel(nn.Module):
    """A grouped convolution's weights; the number of groups is told at the call."""

    def __init__(self, outputs: int, inputs: int, extent: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = empty(outputs, inputs, extent, extent)
        self.bias = empty(outputs) if bias else None

    def convolve(self, x: Tensor, groups: int) -> Tensor:
        pad = self.weight.shape[-1] // 2
        return F.conv2d(x, self.weight.to(x.dtype), cast(self.bias, x), padding=pad, groups=groups)


class ScaleProjection(nn.Module):
    """Queries, keys and values seen through a wider window: depthwise, then 1x1 within each head's third."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        channels, _, extent, _ = section.shape("proj_in.weight")
        self.proj_in = DepthKernel(channels, 1, extent, bias=False)
        self.proj_out = DepthKernel(channels, section.shape("proj_out.weight")[1], 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        channels, per_group = x.shape[1], self.proj_out.weight.shape[1]
        return self.proj_out.convolve(self.proj_in.convolve(x, channels), channels // per_group)


class MultiScaleAttention(nn.Module):
    """ReLU linear attention over all positions, once per scale and head; heads are 32 wide."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        inner, width = section.shape("to_q.weight")
        self.to_q = Linear(width, inner, bias=False)
        self.to_k = Linear(width, inner, bias=False)
        self.to_v = Linear(width, inner, bias=False)
        scales = section.count("to_qkv_multiscale.{}.")
        self.to_qkv_multiscale = nn.ModuleList(
            ScaleProjection(section.section(f"to_qkv_multiscale.{scale}.")) for scale in range(scales)
        )
        self.to_out = Linear(inner * (1 + scales), width, bias=False)
        self.norm_out = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, rows, columns) -> the same, residual added."""
        rows, columns = x.shape[2:]
        places = x.permute(0, 2, 3, 1)  # (B, rows, columns, width)
        qkv = torch.cat((self.to_q(places), self.to_k(places), self.to_v(places)), dim=-1).permute(0, 3, 1, 2)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)
        # As trained: each run of 96 channels is one head's query, key and value, wherever the run begins.
        heads = scales.reshape(x.shape[0], -1, 3 * HEAD_WIDTH, rows * columns).float()
        q, k, v = heads.chunk(3, dim=2)  # (B, heads, 32, rows * columns) each
        state = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.relu().transpose(-2, -1)  # (B, heads, 33, 32)
        mixed = state @ q.relu()
        mixed = mixed[:, :, :-1] / (mixed[:, :, -1:] + 1e-15)
        mixed = mixed.reshape(x.shape[0], -1, rows, columns).permute(0, 2, 3, 1).to(x.dtype)
        return self.norm_out(self.to_out(mixed).permute(0, 3, 1, 2)) + x


class GatedConv(nn.Module):
    """1x1 up, SiLU, 3x3 depthwise, one half gates the other, 1x1 down, norm, residual."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        wide, width = section.shape("conv_inverted.weight")[:2]
        self.conv_inverted = Conv(width, wide, (1, 1))
        self.conv_depth = DepthKernel(wide, 1, 3, bias=True)
        self.conv_point = Conv(wide // 2, width, (1, 1), bias=False)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        pieces = in_windows(self._piece, x, window=8 * DECODE_WINDOW_COLUMNS, reach=1, factor=1)
        return torch.cat(list(pieces), dim=-1) + x

    def _piece(self, x: Tensor) -> Tensor:
        wide = self.conv_depth.convolve(F.silu(self.conv_inverted(x)), self.conv_depth.weight.shape[0])
        value, gate = wide.chunk(2, dim=1)
        return self.norm(self.conv_point(value * F.silu(gate)))


class AttentionBlock(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.attn = MultiScaleAttention(section.section("attn."))
        self.conv_out = GatedConv(section.section("conv_out."))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class UpBlock(nn.Module):
    """Twice the size: nearest neighbours, 3x3, plus channels laid out as pixels."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        outputs, inputs = section.shape("conv.weight")[:2]
        self.conv = Conv(inputs, outputs, (3, 3), pad=1)
        self.repeats = outputs * 4 // inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest")) + shortcut


class DownBlock(nn.Module):
    """Half the size: 3x3 with stride 2, plus pixels laid out as channels and averaged."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        outputs, inputs = section.shape("conv.weight")[:2]
        self.conv = Conv(inputs, outputs, (3, 3), stride=2, pad=1)
        self.group = inputs * 4 // outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.pixel_unshuffle(x, 2).unflatten(1, (-1, self.group)).mean(dim=2)


def levels_of(section: Checkpoint, name: str, resize: type[UpBlock] | type[DownBlock]) -> nn.ModuleList:
    """The levels under `name` ("up_blocks"), finest first, each a list of blocks recognised by their tensors."""
    levels = []
    for level in range(section.count(f"{name}.{{}}.")):
        blocks: list[nn.Module] = []
        for number in range(section.count(f"{name}.{level}.{{}}.")):
            part = section.section(f"{name}.{level}.{number}.")
            kind = AttentionBlock if "attn.to_q.weight" in part else ResBlock if "conv1.weight" in part else resize
            blocks.append(kind(part))
        levels.append(nn.ModuleList(blocks))
    return nn.ModuleList(levels)


class Decoder(nn.Module):
    """Latents (B, 8, 16, n) -> (B, 2, 128, 8n), in pieces along the last axis."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        width, latents = section.shape("conv_in.weight")[:2]
        outputs, finest = section.shape("conv_out.weight")[:2]
        self.conv_in = Conv(latents, width, (3, 3), pad=1)
        self.repeats = width // latents
        self.up_blocks = levels_of(section, "up_blocks", UpBlock)
        self.norm_out = ChannelNorm(finest)
        self.conv_out = Conv(finest, outputs, (3, 3), pad=1)
        self.factor = 2 ** (len(self.up_blocks) - 1)

    def pieces(self, latents: Tensor, window: int = DECODE_WINDOW_COLUMNS) -> Iterator[Tensor]:
        """The spectrogram, `window` latent columns at a time."""
        x = self.conv_in(latents) + latents.repeat_interleave(self.repeats, dim=1)
        levels = list(reversed(self.up_blocks))
        whole = [level for level in levels if any(isinstance(block, AttentionBlock) for block in level)]
        for level in whole:
            for block in level:
                x = block(x)
        fine = levels[len(whole) :]
        factor = 2 ** sum(isinstance(block, UpBlock) for level in fine for block in level)

        def refine(piece: Tensor) -> Tensor:
            for level in fine:
                for block in level:
                    piece = block(piece)
            return self.conv_out(F.relu(self.norm_out(piece)))

        yield from in_windows(refine, x, window=window, reach=reach_of(fine), factor=factor)

    def forward(self, latents: Tensor, window: int = DECODE_WINDOW_COLUMNS) -> Tensor:
        return torch.cat(list(self.pieces(latents, window)), dim=-1)


def reach_of(levels: list[nn.ModuleList]) -> int:
    """Columns of the first level's input that an output sees on each side."""
    columns, scale = 0.0, 1.0
    for level in levels:
        for block in level:
            if isinstance(block, UpBlock):
                scale /= 2
            columns += scale * (1 if isinstance(block, UpBlock) else ResBlock.reach)
    return int(columns + scale) + 1  # and the last 3x3


class Encoder(nn.Module):
    """(B, 2, 128, 8n) -> latents (B, 8, 16, n)."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        finest, inputs = section.shape("conv_in.weight")[:2]
        latents, width = section.shape("conv_out.weight")[:2]
        self.conv_in = Conv(inputs, finest, (3, 3), pad=1)
        self.down_blocks = levels_of(section, "down_blocks", DownBlock)
        self.conv_out = Conv(width, latents, (3, 3), pad=1)
        self.group = width // latents

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = self.conv_in(spectrogram)
        for level in self.down_blocks:
            for block in level:
                x = block(x)
        return self.conv_out(x) + x.unflatten(1, (-1, self.group)).mean(dim=2)


class AceDcae(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.encoder = Encoder(section.section("encoder."))
        self.decoder = Decoder(section.section("decoder."))

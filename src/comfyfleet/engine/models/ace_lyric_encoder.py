"""The lyric encoder of ACE-Step v1: token ids to one row per token, before the diffusion transformer sees them.

A pre-norm Transformer encoder with relative positions (the conformer's frame without its convolutions), always in
evaluation mode: dropout never runs, so a prompt has one encoding. Names follow the checkpoint, so its tensors load
directly; every size is read from their shapes. Padding masks do not exist here: lyrics come one prompt at a time.

Sources: Gulati et al. 2020 (conformer); Dai et al. 2019, appendix B, and section 3.3 (relative positions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import LayerNorm, Linear, empty


@dataclass(frozen=True, kw_only=True)
class LyricEncoderSizes:
    """`inputs`: width of the lyric embeddings; `width`: of the encoder; `hidden`: of its feed-forward layers."""

    inputs: int
    width: int
    heads: int
    hidden: int
    layers: int

    @staticmethod
    def of(section: Checkpoint) -> LyricEncoderSizes:
        """Read from the shapes of the tensors under "lyric_encoder."."""
        width, inputs = section.shape("embed.out.0.weight")
        return LyricEncoderSizes(
            inputs=inputs,
            width=width,
            heads=section.shape("encoders.0.self_attn.pos_bias_u")[0],
            hidden=section.shape("encoders.0.feed_forward.w_1.weight")[0],
            layers=section.count("encoders.{}."),
        )


def relative_positions(length: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sine rows for the distances length-1 … -(length-1), (2 length - 1, width); sine on even columns, cosine on odd.

    Computed in float32, as the reference does, then cast.
    """
    distances = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)
    columns = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angles = distances[:, None] * torch.exp(columns * -(math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(dtype)


def by_distance_to_by_key(scores: Tensor) -> Tensor:
    """(B, heads, T, 2T-1) scored by distance -> (B, heads, T, T) scored by key position.

    Row i holds distances T-1 … -(T-1); its key j is at distance i - j, column T-1-i+j. One padded column and a
    reshape put each row's own window first (Dai et al., appendix B).
    """
    batch, heads, rows, columns = scores.shape
    padded = F.pad(scores, (1, 0)).view(batch, heads, columns + 1, rows)
    return padded[:, :, 1:].reshape(batch, heads, rows, columns)[..., : columns // 2 + 1]


class RelativeAttention(nn.Module):
    """Self-attention whose scores add a content term and a distance term, each with a learned bias per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = Linear(width, width)
        self.linear_k = Linear(width, width)
        self.linear_v = Linear(width, width)
        self.linear_out = Linear(width, width)
        self.linear_pos = Linear(width, width, bias=False)
        self.pos_bias_u = empty(heads, width // heads)
        self.pos_bias_v = empty(heads, width // heads)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: (B, T, width); positions: (2T-1, width) -> (B, T, width)."""
        batch, length, width = x.shape
        head_width = width // self.heads
        q = self.linear_q(x).view(batch, length, self.heads, head_width)
        k = self.linear_k(x).view(batch, length, self.heads, head_width).transpose(1, 2)
        v = self.linear_v(x).view(batch, length, self.heads, head_width).transpose(1, 2)
        p = self.linear_pos(positions).view(1, -1, self.heads, head_width).transpose(1, 2)

        content = (q + self.pos_bias_u.to(q.dtype)).transpose(1, 2) @ k.transpose(-2, -1)  # (B, heads, T, T)
        distance = (q + self.pos_bias_v.to(q.dtype)).transpose(1, 2) @ p.transpose(-2, -1)  # (B, heads, T, 2T-1)
        scores = (content + by_distance_to_by_key(distance)) / math.sqrt(head_width)

        mixed = scores.softmax(dim=-1) @ v  # (B, heads, T, head width)
        return self.linear_out(mixed.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = Linear(width, hidden)
        self.w_2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, sizes: LyricEncoderSizes) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(sizes.width, sizes.heads)
        self.feed_forward = FeedForward(sizes.width, sizes.hidden)
        self.norm_mha = LayerNorm(sizes.width, 1e-5)
        self.norm_ff = LayerNorm(sizes.width, 1e-5)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions)
        return x + self.feed_forward(self.norm_ff(x))


class InputEmbedding(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.out = nn.Sequential(Linear(inputs, width), LayerNorm(width, 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, width), scaled by the square root of the width."""
        return self.out(x) * self.scale


class LyricEncoder(nn.Module):
    """(B, T, inputs) lyric embeddings -> (B, T, width)."""

    def __init__(self, sizes: LyricEncoderSizes) -> None:
        super().__init__()
        self.width = sizes.width
        self.embed = InputEmbedding(sizes.inputs, sizes.width)
        self.encoders = nn.ModuleList(EncoderLayer(sizes) for _ in range(sizes.layers))
        self.after_norm = LayerNorm(sizes.width, 1e-5)

    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.embed(embeddings)
        positions = relative_positions(x.shape[1], self.width, device=x.device, dtype=x.dtype)
        for layer in self.encoders:
            x = layer(x, positions)
        return self.after_norm(x)

"""ACE-Step v1's diffusion transformer: latents (B, 8, 16, columns), a timestep and a context to a velocity.

One token per latent column (patch 16 x 1). Each block is linear self-attention (ReLU kernel), softmax cross-attention
to the context and a gated depthwise-convolution feed-forward, modulated by AdaLN-single: one projection of the
timestep shared by all blocks plus a learned table per block. Names follow the checkpoint; sizes are read from shapes,
heads are 128 wide. The context (speaker | tags | lyrics) and the cross-attention's keys and values do not depend on
the step: `prepare` makes them once, `forward` takes them. No mask exists: prompts are not padded.

Sources: ACE-Step technical report (arXiv 2506.00045); SANA (arXiv 2410.10629) for the blocks; rotary positions as in
Su et al. 2021 with the checkpoint's own pairing, see `rotary_tables`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.ace_lyric_encoder import LyricEncoder, LyricEncoderSizes
from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import Embedding, GroupNorm, Linear, cast, empty

HEAD_WIDTH = 128
ROPE_BASE = 1_000_000.0
TIME_FEATURES = 256
PATCH_NORM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """All sizes of a checkpoint's diffusion model; `patch` is (latent height, columns per token)."""

    channels: int
    patch: tuple[int, int]
    patch_width: int
    width: int
    layers: int
    hidden: int
    text_width: int
    speaker_width: int
    lyric_rows: int
    lyrics: LyricEncoderSizes

    @staticmethod
    def of(section: Checkpoint) -> TransformerSizes:
        patch_width, channels, height, columns = section.shape("proj_in.early_conv_layers.0.weight")
        width, speaker_width = section.shape("speaker_embedder.weight")
        return TransformerSizes(
            channels=channels,
            patch=(height, columns),
            patch_width=patch_width,
            width=width,
            layers=section.count("transformer_blocks.{}."),
            hidden=section.shape("transformer_blocks.0.ff.point_conv.conv.weight")[1],
            text_width=section.shape("genre_embedder.weight")[1],
            speaker_width=speaker_width,
            lyric_rows=section.shape("lyric_embs.weight")[0],
            lyrics=LyricEncoderSizes.of(section.section("lyric_encoder.")),
        )


# ace_step_v1_3.5b, for measurements without its file: 2.59 billion weights in use.
PUBLISHED_SIZES = TransformerSizes(
    channels=8,
    patch=(16, 1),
    patch_width=2048,
    width=2560,
    layers=24,
    hidden=6400,
    text_width=768,
    speaker_width=512,
    lyric_rows=6693,
    lyrics=LyricEncoderSizes(inputs=1024, width=1024, heads=16, hidden=4096, layers=6),
)


@dataclass(frozen=True, kw_only=True)
class PreparedContext:
    """What one conditioning is to every step: per block, cross-attention keys (turned) and values (B, H, n, 128)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def expand(self, batch: int) -> PreparedContext:
        """For `batch` latents: one row serves all; several rows are repeated in turn."""
        rows = self.keys[0].shape[0]
        if rows == batch:
            return self
        if rows == 1:
            sizes = (batch, -1, -1, -1)
            return PreparedContext(
                keys=tuple(each.expand(*sizes) for each in self.keys),
                values=tuple(each.expand(*sizes) for each in self.values),
            )
        order = torch.arange(batch, device=self.keys[0].device) % rows
        return PreparedContext(
            keys=tuple(each[order] for each in self.keys), values=tuple(each[order] for each in self.values)
        )


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Cosine and sine factors, each (tokens, 128), float32."""

    cos: Tensor
    sin: Tensor


def rotary_tables(tokens: int, device: torch.device) -> Rotary:
    """The checkpoint's rotary factors.

    The 64 frequencies are laid out as two equal halves, while `turn` pairs neighbours (2i, 2i+1): the two members of
    a pair get different frequencies, so this is no rotation in the strict sense. The model was trained so.
    """
    exponents = torch.arange(0, HEAD_WIDTH, 2, dtype=torch.int64, device=device).float() / HEAD_WIDTH
    frequencies = 1.0 / (ROPE_BASE**exponents)
    angles = torch.outer(torch.arange(tokens, device=device).float(), frequencies).repeat(1, 2)
    return Rotary(cos=angles.cos(), sin=angles.sin())


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary positions to (B, H, tokens, 128): (a, b) -> (a cos - b sin, b cos' + a sin') for each pair. float32.

    Written as one product and two sums in place: this runs three times a block and is bound by memory.
    """
    x = x.float()
    turned = x * rotary.cos
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    sin_a, sin_b = rotary.sin.unflatten(-1, (-1, 2)).unbind(-1)
    turned_a, turned_b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned_a.addcmul_(b, sin_a, value=-1.0)
    turned_b.addcmul_(a, sin_b)
    return turned


def timestep_features(timestep: Tensor) -> Tensor:
    """(B,) -> (B, 256): cosines then sines of 128 geometric frequencies (Vaswani et al. 2017), float32."""
    half = TIME_FEATURES // 2
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * exponents.exp()[None]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rms(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, without weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def split_heads(x: Tensor) -> Tensor:
    """(B, tokens, H * 128) -> (B, H, tokens, 128)."""
    return x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Linear attention: out_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) . sum_j phi(k_j)); phi = ReLU; float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q = turn(split_heads(self.to_q(x)), rotary).relu_()
        k = turn(split_heads(self.to_k(x)), rotary).relu_()
        v = split_heads(self.to_v(x)).float()
        # A column of ones rides along with the values and becomes the denominator.
        state = k.transpose(-2, -1) @ F.pad(v, (0, 1), value=1.0)  # (B, H, 128, 129)
        mixed = q @ state
        mixed = mixed[..., :-1] / (mixed[..., -1:] + 1e-15)
        return self.to_out[0](join_heads(mixed).to(x.dtype))


class CrossAttention(nn.Module):
    """Softmax attention to the context. The `add_*` projections exist in the checkpoint and are not used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, x: Tensor, rotary: Rotary, keys: Tensor, values: Tensor) -> Tensor:
        q = turn(split_heads(self.to_q(x)), rotary).to(x.dtype)
        return self.to_out[0](join_heads(F.scaled_dot_product_attention(q, keys, values)))


class Kernel(nn.Module):
    """A convolution's weights; who holds it applies it, as a matrix product wherever it is one."""

    def __init__(self, outputs: int, inputs: int, *extent: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = empty(outputs, inputs, *extent)
        self.bias = empty(outputs) if bias else None

    def product(self, x: Tensor) -> Tensor:
        """Inputs that a kernel's position sees, flat on the last axis -> outputs."""
        return F.linear(x, self.weight.flatten(1).to(x.dtype), cast(self.bias, x))


class NamedConv(nn.Module):
    """A kernel under the checkpoint's name `<x>.conv`."""

    def __init__(self, outputs: int, inputs: int, extent: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = Kernel(outputs, inputs, extent, bias=bias)


class FeedForward(nn.Module):
    """1x1 up to twice `hidden`, SiLU, depthwise over 3 tokens, one half gates the other, 1x1 down (SANA's Mix-FFN)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inverted_conv = NamedConv(2 * hidden, width, 1)
        self.depth_conv = NamedConv(2 * hidden, 1, 3)
        self.point_conv = NamedConv(width, hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same. Tokens stay in front: both 1x1 convolutions are plain products."""
        up, deep, down = self.inverted_conv.conv, self.depth_conv.conv, self.point_conv.conv
        x = F.silu(up.product(x))  # (B, tokens, 2 hidden)
        x, gate = over_three_tokens(x, deep.weight.to(x.dtype), cast(deep.bias, x)).chunk(2, dim=-1)
        return down.product(x * F.silu(gate))


def over_three_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution along axis 1. x: (B, tokens, channels); weight: (channels, 1, 3); zeros beyond the ends.

    Three shifted products: no transposition and, where kernels are fused, one pass over memory.
    """
    before, here, after = weight[:, 0].unbind(-1)
    out = x * here if bias is None else torch.addcmul(bias, x, here)
    out[:, 1:].addcmul_(x[:, :-1], before)
    out[:, :-1].addcmul_(x[:, 1:], after)
    return out


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width)
        self.cross_attn = CrossAttention(width)
        self.ff = FeedForward(width, hidden)
        self.scale_shift_table = empty(6, width)

    def forward(self, x: Tensor, time: Tensor, rotary: Rotary, keys: Tensor, values: Tensor) -> Tensor:
        """x: (B, tokens, width); time: (B, 6, width), the shared projection of the timestep."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (self.scale_shift_table[None].to(x.dtype) + time).chunk(
            6, dim=1
        )
        x = x + gate * self.attn(torch.addcmul(shift, rms(x), 1 + scale), rotary)
        x = x + self.cross_attn(x, rotary, keys, values)
        return x + gate_ff * self.ff(torch.addcmul(shift_ff, rms(x), 1 + scale_ff))


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(TIME_FEATURES, width)
        self.linear_2 = Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class PatchEmbedding(nn.Module):
    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.patch = sizes.patch
        self.early_conv_layers = nn.ModuleList(
            [
                Kernel(sizes.patch_width, sizes.channels, *sizes.patch),
                GroupNorm(sizes.patch_width, 1e-6, PATCH_NORM_GROUPS),
                Kernel(sizes.width, sizes.patch_width, 1, 1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8, 16, columns) -> (B, tokens, width)."""
        cut, norm, project = self.early_conv_layers
        width = self.patch[1]
        columns = x[..., : x.shape[-1] // width * width].unflatten(-1, (-1, width))  # (B, 8, 16, tokens, width)
        x = cut.product(columns.permute(0, 3, 1, 2, 4).flatten(2))  # (B, tokens, patch width)
        return project.product(norm(x.transpose(1, 2)).transpose(1, 2))


class FinalLayer(nn.Module):
    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.channels, self.patch = sizes.channels, sizes.patch
        self.linear = Linear(sizes.width, sizes.patch[0] * sizes.patch[1] * sizes.channels)
        self.scale_shift_table = empty(2, sizes.width)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """x: (B, tokens, width); embedded: (B, width) timestep embedding -> (B, 8, 16, columns)."""
        shift, scale = (self.scale_shift_table[None].to(x.dtype) + embedded[:, None]).chunk(2, dim=1)
        x = self.linear(torch.addcmul(shift, rms(x), 1 + scale))
        x = x.unflatten(-1, (*self.patch, self.channels))  # (B, tokens, 16, 1, 8)
        return x.permute(0, 4, 2, 1, 3).flatten(3)


class AceTransformer(nn.Module):
    """The network. `encode_context`, then `prepare`, once per conditioning; `forward` at every step."""

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.proj_in = PatchEmbedding(sizes)
        self.timestep_embedder = TimestepEmbedder(sizes.width)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(sizes.width, 6 * sizes.width))
        self.speaker_embedder = Linear(sizes.speaker_width, sizes.width)
        self.genre_embedder = Linear(sizes.text_width, sizes.width)
        self.lyric_embs = Embedding(sizes.lyric_rows, sizes.lyrics.inputs)
        self.lyric_encoder = LyricEncoder(sizes.lyrics)
        self.lyric_proj = Linear(sizes.lyrics.width, sizes.width)
        self.transformer_blocks = nn.ModuleList(Block(sizes.width, sizes.hidden) for _ in range(sizes.layers))
        self.final_layer = FinalLayer(sizes)

    def repeated_blocks(self) -> nn.ModuleList:
        return self.transformer_blocks

    def encode_lyrics(self, lyric_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, n) ids -> (B, n, width), before the strength factor, computed in `dtype`."""
        return self.lyric_proj(self.lyric_encoder(self.lyric_embs(lyric_ids).to(dtype)))

    def encode_context(self, text: Tensor, lyric_ids: Tensor, lyrics_strength: float) -> Tensor:
        """text: (B, tags, text width); lyric_ids: (B, n) -> (B, 1 + tags + n, width): speaker | tags | lyrics."""
        nobody = text.new_zeros((text.shape[0], 1, self.sizes.speaker_width))
        lyrics = self.encode_lyrics(lyric_ids, text.dtype) * lyrics_strength
        return torch.cat((self.speaker_embedder(nobody), self.genre_embedder(text), lyrics), dim=1)

    def prepare(self, context: Tensor) -> PreparedContext:
        """(B, n, width) -> keys and values of every block."""
        rotary = rotary_tables(context.shape[1], context.device)
        attentions = [block.cross_attn for block in self.transformer_blocks]
        return PreparedContext(
            keys=tuple(turn(split_heads(each.to_k(context)), rotary).to(context.dtype) for each in attentions),
            values=tuple(split_heads(each.to_v(context)).contiguous() for each in attentions),
        )

    def forward(self, x: Tensor, timestep: Tensor, prepared: PreparedContext, rotary: Rotary) -> Tensor:
        """x: (B, 8, 16, columns); timestep: (B,) = 1000 sigma; rotary: for columns tokens -> velocity of x's shape."""
        columns = x.shape[-1]
        embedded = self.timestep_embedder(timestep_features(timestep).to(x.dtype))
        time = self.t_block(embedded).unflatten(-1, (6, -1))
        x = self.proj_in(x)
        for block, keys, values in zip(self.transformer_blocks, prepared.keys, prepared.values, strict=True):
            x = block(x, time, rotary, keys, values)
        out = self.final_layer(x, embedded)
        # A patch wider than one column drops a remainder; the velocity there is zero.
        return F.pad(out, (0, columns - out.shape[-1]))

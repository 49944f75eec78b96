"""The Wan 2.1/2.2 video transformer (text to video): one network, flat, with the published tensor names.

A latent film is cut into patches; each block attends over all of them (rotary positions along time, height, width),
then over the text, then applies an MLP; the timestep enters as shift, scale and gate. All sizes come from shapes:
heads are 128 wide, the patch is the kernel of `patch_embedding`.
Source: Wan technical report (arXiv 2503.20314); adaptive norm: Peebles & Xie 2023; rotary positions: Su et al. 2021.
Not here: image-to-video inputs, camera and control branches.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import Conv, LayerNorm, Linear, RMSNorm, attention, empty, fastest_attention
from comfyfleet.engine.models.lora import Patches, module_names
from comfyfleet.engine.models.prompts import check_text_width, expand
from comfyfleet.engine.models.residency import Precision, Resident, Source
from comfyfleet.engine.values import ConditioningEntry
from comfyfleet.wire.errors import ModelFileUnusable

HEAD_WIDTH = 128
ROTARY_WIDTHS = (44, 42, 42)  # of a head's 128: time, height, width
ROTARY_BASE = 10_000.0
DEFAULT_SHIFT = 8.0
EPS = 1e-6

# fp16, as ComfyUI computes Wan where it can: three more mantissa bits than bf16. Biases of fp8 Linears are e4m3 there.
PRECISION = Precision(on_cuda=torch.float16, fp8_bias=True, never_rounded=("patch_embedding",))

# Mean and standard deviation of the Wan 2.1 VAE's 16 latent channels (published with the VAE's configuration).
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WanSizes:
    """Everything that shapes tell about a Wan file."""

    width: int
    ffn_width: int
    blocks: int
    channels_in: int
    channels_out: int
    text_width: int
    time_width: int
    patch: tuple[int, int, int]

    @property
    def heads(self) -> int:
        return self.width // HEAD_WIDTH


def read_sizes(section: Checkpoint) -> WanSizes:
    """Sizes from shapes. Raises ModelFileUnusable for the Wan variants that this engine lacks."""
    file = Path(section.path).name
    width, channels_in, *patch = section.shape("patch_embedding.weight")
    if any(name.startswith(("img_emb.", "vace_", "control_adapter.")) for name in section) or channels_in > 16:
        raise ModelFileUnusable(f"{file} is a Wan model with image or control inputs; text-to-video only", file=file)
    if width % HEAD_WIDTH or len(patch) != 3:
        raise ModelFileUnusable(f"{file} has an odd width: {width} is no multiple of {HEAD_WIDTH}", file=file)
    return WanSizes(
        width=width,
        ffn_width=section.shape("blocks.0.ffn.0.weight")[0],
        blocks=section.count("blocks.{}."),
        channels_in=channels_in,
        channels_out=section.shape("head.head.weight")[0] // math.prod(patch),
        text_width=section.shape("text_embedding.0.weight")[1],
        time_width=section.shape("time_embedding.0.weight")[1],
        patch=(patch[0], patch[1], patch[2]),
    )


class WanAttention(nn.Module):
    """Self- or cross-attention with normed queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, EPS), RMSNorm(width, EPS)

    def over_itself(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q = rotate(self.norm_q(self.q(x)), rotary, self.heads)
        k = rotate(self.norm_k(self.k(x)), rotary, self.heads)
        return self.o(attention(q, k, self.v(x), self.heads))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.k(context)), self.v(context)

    def over_text(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.o(attention(self.norm_q(self.q(x)), keys, values, self.heads))


class WanBlock(nn.Module):
    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        width = sizes.width
        self.modulation = empty(1, 6, width)
        self.norm1 = LayerNorm(width, EPS, affine=False)
        self.self_attn = WanAttention(width)
        self.norm3 = LayerNorm(width, EPS)
        self.cross_attn = WanAttention(width)
        self.norm2 = LayerNorm(width, EPS, affine=False)
        self.ffn = nn.ModuleList([Linear(width, sizes.ffn_width), nn.GELU("tanh"), Linear(sizes.ffn_width, width)])

    def forward(self, x: Tensor, time: Tensor, rotary: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]) -> Tensor:
        """x: (B, tokens, width). time: (B, 6, width). text: this block's keys and values of the context."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.to(x.dtype) + time).chunk(6, dim=1)
        x = x + gate1 * self.self_attn.over_itself(self.norm1(x) * (1 + scale1) + shift1, rotary)
        x = x + self.cross_attn.over_text(self.norm3(x), *text)
        y = self.norm2(x) * (1 + scale2) + shift2
        for layer in self.ffn:
            y = layer(y)
        return x + gate2 * y


class WanHead(nn.Module):
    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        self.modulation = empty(1, 2, sizes.width)
        self.norm = LayerNorm(sizes.width, EPS, affine=False)
        self.head = Linear(sizes.width, math.prod(sizes.patch) * sizes.channels_out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.to(x.dtype) + time[:, None]).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanTransformer(nn.Module):
    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.width
        self.patch_embedding = Conv(sizes.channels_in, width, sizes.patch)
        self.text_embedding = nn.ModuleList([Linear(sizes.text_width, width), nn.GELU("tanh"), Linear(width, width)])
        self.time_embedding = nn.ModuleList([Linear(sizes.time_width, width), nn.SiLU(), Linear(width, width)])
        self.time_projection = nn.ModuleList([nn.SiLU(), Linear(width, 6 * width)])
        self.blocks = nn.ModuleList(WanBlock(sizes) for _ in range(sizes.blocks))
        self.head = WanHead(sizes)

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def read_text(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """context: (B, tokens, text width) -> each block's keys and values, (B, tokens, width) both."""
        for layer in self.text_embedding:
            context = layer(context)
        return [block.cross_attn.keys_and_values(context) for block in self.blocks]

    def forward(self, x: Tensor, timestep: Tensor, texts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x: (B, C, T, H, W) latents -> velocity of the same shape. timestep: (B,), 1000 sigma."""
        frames, height, width = x.shape[2:]
        x = pad_to_patches(x, self.sizes.patch)
        x = patchify(x, self.patch_embedding)
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)  # (B, tokens, width)
        time = sinusoid(timestep, self.sizes.time_width).to(x.dtype)
        for layer in self.time_embedding:
            time = layer(time)
        modulation = time
        for layer in self.time_projection:
            modulation = layer(modulation)
        modulation = modulation.unflatten(1, (6, -1))
        rotary = rotary_angles(tuple(grid), x.device)
        for block, text in zip(self.blocks, texts, strict=True):
            x = block(x, modulation, rotary, text)
        x = unpatchify(self.head(x, time), grid, self.sizes.patch)
        return x[:, :, :frames, :height, :width]


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): cosines, then sines, of timestep x 10000^(-i / half). Source: Vaswani et al. 2017."""
    half = width // 2
    rates = torch.pow(10_000.0, -torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = torch.outer(timestep.float(), rates)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@functools.lru_cache(maxsize=2)  # a job has one grid, and asks for it at every step
def rotary_angles(grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines per token, (tokens, 1, 64) both: 22 pairs turn with time, 21 with height, 21 with width."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = []
    for position, width in zip(axes, ROTARY_WIDTHS, strict=True):
        rates = ROTARY_BASE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(position.reshape(-1, 1) * rates)
    joined = torch.cat(angles, dim=1)[:, None, :]
    return joined.cos().float().to(device), joined.sin().float().to(device)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Turn neighbouring pairs of each head by the token's angles, in float32. x: (B, tokens, heads x 128)."""
    cos, sin = rotary
    first, second = x.float().unflatten(-1, (heads, -1, 2)).unbind(-1)  # (B, tokens, heads, 64)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(2).to(x.dtype)


def pad_to_patches(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Latents whose sides are no multiple of the patch are continued from their other end, as ComfyUI does."""
    missing = [-size % step for size, step in zip(x.shape[2:], patch, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="circular")


def patchify(x: Tensor, embedding: Conv) -> Tensor:
    """A convolution whose stride is its kernel, as one matrix product. (B, C, T, H, W) -> (B, width, t, h, w)."""
    weight = embedding.weight
    width, channels, pt, ph, pw = weight.shape
    batch, _, frames, height, across = x.shape
    x = x.view(batch, channels, frames // pt, pt, height // ph, ph, across // pw, pw)
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, t, h, w, C pt ph pw)
    bias = None if embedding.bias is None else embedding.bias.to(x.dtype)
    return F.linear(x, weight.view(width, -1).to(x.dtype), bias).permute(0, 4, 1, 2, 3)


def unpatchify(x: Tensor, grid: torch.Size, patch: tuple[int, int, int]) -> Tensor:
    """(B, tokens, pt ph pw C) -> (B, C, T, H, W)."""
    batch, (t, h, w), (pt, ph, pw) = x.shape[0], grid, patch
    x = x.view(batch, t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, -1, t * pt, h * ph, w * pw)


class WanNetwork(Resident[WanTransformer]):
    """A Wan file as a Denoiser. Keys and values of a text are computed once per run and kept until its end."""

    def __init__(self, source: Source[WanTransformer], device: str = "cpu") -> None:
        super().__init__(source, device)
        self._texts: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: Tensor, conditioning: ConditioningEntry) -> Tensor:
        """x: (B, 16, T, H, W) -> velocity, float32, on x's device. timestep: 1000 sigma."""
        network = self.network()
        texts = self._read(network, conditioning.embedding)
        moved, batch = x.to(self.device, self.dtype), x.shape[0]
        texts = [(expand(keys, batch), expand(values, batch)) for keys, values in texts]
        with fastest_attention(self.device, self.dtype):
            velocity = network(moved, timestep.to(self.device).expand(batch), texts)
        return velocity.float().to(x.device)

    def _read(self, network: WanTransformer, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        # The embedding itself is kept beside its keys: while it lives, no other tensor can have its id.
        known = self._texts.get(id(embedding))
        if known is None:
            check_text_width(embedding, network.sizes.text_width)
            known = (embedding, network.read_text(embedding.to(self.device, self.dtype)))
            self._texts[id(embedding)] = known
        return known[1]

    def end_of_run(self) -> None:
        self._texts.clear()

    def move_to(self, device: str) -> None:
        if device != self.device:
            self.end_of_run()
        super().move_to(device)

    def patched(self, patches: Patches) -> WanNetwork:
        """The same file with more LoRA changes."""
        return WanNetwork(replace(self.source, patches=self.source.patches.and_then(patches)), self.device)

    def lora_names(self) -> dict[str, str]:
        return module_names(
            self.source.checkpoint, dotted=("diffusion_model.", "transformer.", ""), underscored=("lora_unet_",)
        )


def open_wan(section: Checkpoint, device: str = "cpu") -> WanNetwork:
    """A Wan diffusion model from its section of a file; weights are read at first use."""
    read_sizes(section)  # refuse now, not at the first step
    return WanNetwork(
        Source(checkpoint=section, build=lambda file: WanTransformer(read_sizes(file)), precision=PRECISION), device
    )


class WanLatentFormat:
    """Each of the 16 channels to zero mean and unit deviation for the network, and back."""

    channels, axes = 16, 3

    def __init__(self) -> None:
        self.mean = torch.tensor(LATENT_MEAN).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(LATENT_STD).view(1, -1, 1, 1, 1)

    def to_network(self, samples: Tensor) -> Tensor:
        return (samples - self.mean.to(samples)) / self.std.to(samples)

    def from_network(self, samples: Tensor) -> Tensor:
        return samples * self.std.to(samples) + self.mean.to(samples)

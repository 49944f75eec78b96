"""The Stable Diffusion 1.5 UNet: predicts the noise in a latent picture, told a timestep and a prompt.

A U of residual blocks with self- and cross-attention at the wider levels, in the published (ldm) tensor names. Which
block holds what is read from the names present, so other widths, depths and attention levels load as well.
Source: Rombach et al. 2022; Ho et al. 2020. Not here: SDXL, SD2, inpainting inputs, ControlNet.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import Conv, GroupNorm, LayerNorm, Linear, attention, fastest_attention
from comfyfleet.engine.models.lora import Patches, module_names
from comfyfleet.engine.models.prompts import check_text_width, expand
from comfyfleet.engine.models.residency import Precision, Resident, Source
from comfyfleet.engine.models.sd15_names import diffusers_modules
from comfyfleet.engine.values import ConditioningEntry
from comfyfleet.wire.errors import ModelFileUnusable

HEADS = 8
LATENT_SCALE = 0.18215
PRECISION = Precision(on_cuda=torch.float16)

# Keys and values of the context, by cross-attention module name.
Texts = dict[str, tuple[Tensor, Tensor]]


class ResidualBlock(nn.Module):
    """Two convolutions with the time embedding added between them; a 1x1 skip where the width changes."""

    def __init__(self, width_in: int, width_out: int, time_width: int) -> None:
        super().__init__()
        self.in_layers = nn.ModuleList([GroupNorm(width_in, 1e-5), nn.SiLU(), Conv(width_in, width_out, (3, 3), pad=1)])
        self.emb_layers = nn.ModuleList([nn.SiLU(), Linear(time_width, width_out)])
        self.out_layers = nn.ModuleList(
            [GroupNorm(width_out, 1e-5), nn.SiLU(), nn.Identity(), Conv(width_out, width_out, (3, 3), pad=1)]
        )
        self.skip_connection = nn.Identity() if width_in == width_out else Conv(width_in, width_out, (1, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = through(self.in_layers, x) + through(self.emb_layers, time)[:, :, None, None]
        return self.skip_connection(x) + through(self.out_layers, y)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.to_q = Linear(width, width, bias=False)
        self.to_k, self.to_v = Linear(context_width, width, bias=False), Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width), nn.Identity()])

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
        return self.to_out[0](attention(self.to_q(x), keys, values, heads))


class GatedLinear(nn.Module):
    """GEGLU (Shazeer 2020)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = Linear(width_in, 2 * width_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GatedLinear(width, hidden), nn.Identity(), Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        return through(self.net, x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, 1e-5) for _ in range(3))
        self.attn1 = CrossAttention(width, width)
        self.attn2 = CrossAttention(width, context_width)
        self.ff = FeedForward(width, hidden)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], heads: int) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, self.attn1.to_k(y), self.attn1.to_v(y), heads)
        x = x + self.attn2(self.norm2(x), *text, heads)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention over all places of a feature map, and over the prompt. `path` is its place in the file."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        super().__init__()
        inner = f"{path}.transformer_blocks.0."
        width = section.shape(f"{path}.norm.weight")[0]
        context_width = section.shape(f"{inner}attn2.to_k.weight")[1]
        hidden = section.shape(f"{inner}ff.net.2.weight")[1]
        depth = section.count(path + ".transformer_blocks.{}.")
        self.path, self.heads = path, int(section.sizes.get("unet", {}).get("num_heads", HEADS))
        self.norm = GroupNorm(width, 1e-6)
        self.proj_in, self.proj_out = Conv(width, width, (1, 1)), Conv(width, width, (1, 1))
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, context_width, hidden) for _ in range(depth))

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        batch, width, height, across = x.shape
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, C)
        for number, block in enumerate(self.transformer_blocks):
            y = block(y, texts[f"{self.path}.{number}"], self.heads)
        return x + self.proj_out(y.transpose(1, 2).reshape(batch, width, height, across))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = Conv(width, width, (3, 3), stride=2, pad=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, (3, 3), pad=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """To `size`, which for odd pictures is one less than twice."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Unet(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.width = section.shape("input_blocks.0.0.weight")[0]
        self.text_width = section.shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
        time_width = section.shape("time_embed.0.weight")[0]
        self.time_embed = nn.ModuleList([Linear(self.width, time_width), nn.SiLU(), Linear(time_width, time_width)])
        self.input_blocks = _blocks(section, "input_blocks")
        self.middle_block = _block(section, "middle_block")
        self.output_blocks = _blocks(section, "output_blocks")
        channels_out = section.shape("out.2.weight")[0]
        self.out = nn.ModuleList(
            [GroupNorm(self.width, 1e-5), nn.SiLU(), Conv(self.width, channels_out, (3, 3), pad=1)]
        )

    def read_text(self, context: Tensor) -> Texts:
        """context: (B, tokens, width) -> keys and values of every cross-attention."""
        return {
            f"{layer.path}.{number}": (block.attn2.to_k(context), block.attn2.to_v(context))
            for layer in self.modules()
            if isinstance(layer, SpatialTransformer)
            for number, block in enumerate(layer.transformer_blocks)
        }

    def forward(self, x: Tensor, timestep: Tensor, texts: Texts) -> Tensor:
        """x: (B, 4, h, w) -> the noise in it, same shape. timestep: (B,)."""
        time = through(self.time_embed, sinusoid(timestep, self.width).to(x.dtype))
        passed: list[Tensor] = []
        for block in self.input_blocks:
            x = step(block, x, time, texts, x.shape[2:])
            passed.append(x)
        x = step(self.middle_block, x, time, texts, x.shape[2:])
        for block in self.output_blocks:
            x = torch.cat([x, passed.pop()], dim=1)
            x = step(block, x, time, texts, passed[-1].shape[2:] if passed else x.shape[2:])
        return through(self.out, x)


def step(block: nn.ModuleList, x: Tensor, time: Tensor, texts: Texts, size: torch.Size) -> Tensor:
    """One numbered block of the file; `size` is the skip connection's that the next block will join."""
    for layer in block:
        if isinstance(layer, ResidualBlock):
            x = layer(x, time)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, texts)
        elif isinstance(layer, Upsample):
            x = layer(x, size)
        else:
            x = layer(x)
    return x


def through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): cosines, then sines, of timestep x exp(-ln 10000 i / half). Source: Ho et al. 2020."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep[:, None].float() * rates[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _blocks(section: Checkpoint, name: str) -> nn.ModuleList:
    return nn.ModuleList(_block(section, f"{name}.{number}") for number in range(section.count(name + ".{}.")))


def _block(section: Checkpoint, path: str) -> nn.ModuleList:
    return nn.ModuleList(_layer(section, f"{path}.{n}") for n in range(section.count(path + ".{}.")))


def _layer(section: Checkpoint, path: str) -> nn.Module:
    """The layer at a place, told by the names there."""
    if f"{path}.in_layers.2.weight" in section:
        width_out, width_in = section.shape(f"{path}.in_layers.2.weight")[:2]
        return ResidualBlock(width_in, width_out, section.shape(f"{path}.emb_layers.1.weight")[1])
    if f"{path}.transformer_blocks.0.norm1.weight" in section:
        return SpatialTransformer(section, path)
    if f"{path}.op.weight" in section:
        return Downsample(section.shape(f"{path}.op.weight")[0])
    if f"{path}.conv.weight" in section:
        return Upsample(section.shape(f"{path}.conv.weight")[0])
    width_out, width_in = section.shape(f"{path}.weight")[:2]
    return Conv(width_in, width_out, (3, 3), pad=1)


class UnetNetwork(Resident[Unet]):
    """An SD1.5 file's UNet as a Denoiser. A prompt's keys and values are computed once per run."""

    def __init__(self, source: Source[Unet], device: str = "cpu") -> None:
        super().__init__(source, device)
        self._texts: dict[int, tuple[Tensor, Texts]] = {}

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: Tensor, conditioning: ConditioningEntry) -> Tensor:
        """x: (B, 4, h, w), already divided by sqrt(sigma^2 + 1) -> epsilon, float32, on x's device."""
        network, embedding, batch = self.network(), conditioning.embedding, x.shape[0]
        if id(embedding) not in self._texts:  # the embedding is kept beside its keys, so its id stays its own
            check_text_width(embedding, network.text_width)
            self._texts[id(embedding)] = (embedding, network.read_text(embedding.to(self.device, self.dtype)))
        texts = {
            name: (expand(keys, batch), expand(values, batch))
            for name, (keys, values) in self._texts[id(embedding)][1].items()
        }
        with fastest_attention(self.device, self.dtype):
            epsilon = network(x.to(self.device, self.dtype), timestep.to(self.device).expand(batch), texts)
        return epsilon.float().to(x.device)

    def end_of_run(self) -> None:
        self._texts.clear()

    def move_to(self, device: str) -> None:
        if device != self.device:
            self.end_of_run()
        super().move_to(device)

    def patched(self, patches: Patches) -> UnetNetwork:
        return UnetNetwork(replace(self.source, patches=self.source.patches.and_then(patches)), self.device)

    def lora_names(self) -> dict[str, str]:
        """kohya's files use diffusers' module names; others the file's own."""
        section = self.source.checkpoint
        names = module_names(section, dotted=("diffusion_model.",), underscored=("lora_unet_",))
        for other, own in diffusers_modules(section).items():
            names["lora_unet_" + other.replace(".", "_")] = f"{own}.weight"
            names[f"unet.{other}"] = f"{own}.weight"
        return names


def open_unet(section: Checkpoint, device: str = "cpu") -> UnetNetwork:
    """The UNet from its section of a file. Raises ModelFileUnusable for the relatives that this engine lacks."""
    file = Path(section.path).name
    if "label_emb.0.0.weight" in section or section.shape("input_blocks.0.0.weight")[1] != 4:
        raise ModelFileUnusable(f"{file} is an SDXL or inpainting model; Stable Diffusion 1.5 is needed", file=file)
    if len(section.shape("middle_block.1.proj_in.weight")) != 4:
        raise ModelFileUnusable(f"{file} is a Stable Diffusion 2 model; 1.5 is needed", file=file)
    return UnetNetwork(Source(checkpoint=section, build=Unet, precision=PRECISION), device)


class Sd15LatentFormat:
    """The network sees latents times 0.18215."""

    channels, axes = 4, 2

    def to_network(self, samples: Tensor) -> Tensor:
        return samples * LATENT_SCALE

    def from_network(self, samples: Tensor) -> Tensor:
        return samples / LATENT_SCALE

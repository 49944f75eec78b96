"""The Stable Diffusion 1.5 autoencoder: pictures to latents an eighth as wide, and back.

A convolutional encoder and decoder with one attention in the middle, in the published (ldm) tensor names; sizes from
shapes. Encoding gives the mean of the latent distribution (ComfyUI may add its tiny noise; the mean repeats).
Source: Rombach et al. 2022; Esser et al. 2021. Latents here are as between nodes; the 0.18215 belongs to the UNet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import Conv, GroupNorm, attention
from comfyfleet.engine.models.residency import Precision, Resident, Source
from comfyfleet.wire.errors import ModelFileUnusable

EPS = 1e-6
SHRINK = 8
PRECISION = Precision(on_cuda=torch.bfloat16)


class VaeResidual(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(width_in, EPS), Conv(width_in, width_out, (3, 3), pad=1)
        self.norm2, self.conv2 = GroupNorm(width_out, EPS), Conv(width_out, width_out, (3, 3), pad=1)
        self.nin_shortcut = nn.Identity() if width_in == width_out else Conv(width_in, width_out, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class VaeAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(width, EPS)
        self.q, self.k, self.v, self.proj_out = (Conv(width, width, (1, 1)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2).contiguous() for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attention(q, k, v, heads=1).transpose(1, 2).reshape(x.shape))


class VaeMiddle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            VaeResidual(width, width),
            VaeAttention(width),
            VaeResidual(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VaeUpsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, (3, 3), pad=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VaeDownsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, (3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class VaeLevel(nn.Module):
    """One resolution: its residual blocks, then up or down where the file has that."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        for number in range(section.count(path + ".block.{}.")):
            width_out, width_in = section.shape(f"{path}.block.{number}.conv1.weight")[:2]
            self.block.append(VaeResidual(width_in, width_out))
        for name, kind in (("upsample", VaeUpsample), ("downsample", VaeDownsample)):
            weight = f"{path}.{name}.conv.weight"
            self.add_module(name, kind(section.shape(weight)[0]) if weight in section else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.get_submodule("downsample")(self.get_submodule("upsample")(x))


class VaeDecoder(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        width, channels = section.shape("decoder.conv_in.weight")[:2]
        self.conv_in = Conv(channels, width, (3, 3), pad=1)
        self.mid = VaeMiddle(width)
        self.up = nn.ModuleList(VaeLevel(section, f"decoder.up.{n}") for n in range(section.count("decoder.up.{}.")))
        narrow = section.shape("decoder.conv_out.weight")[1]
        self.norm_out, self.conv_out = GroupNorm(narrow, EPS), Conv(narrow, 3, (3, 3), pad=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VaeEncoder(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        narrow = section.shape("encoder.conv_in.weight")[0]
        self.conv_in = Conv(3, narrow, (3, 3), pad=1)
        levels = section.count("encoder.down.{}.")
        self.down = nn.ModuleList(VaeLevel(section, f"encoder.down.{n}") for n in range(levels))
        channels, width = section.shape("encoder.conv_out.weight")[:2]
        self.mid = VaeMiddle(width)
        self.norm_out, self.conv_out = GroupNorm(width, EPS), Conv(width, channels, (3, 3), pad=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Sd15Vae(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.encoder, self.decoder = VaeEncoder(section), VaeDecoder(section)
        out, inside = section.shape("quant_conv.weight")[:2]
        self.quant_conv = Conv(inside, out, (1, 1))
        out, inside = section.shape("post_quant_conv.weight")[:2]
        self.post_quant_conv = Conv(inside, out, (1, 1))


class Sd15Autoencoder(Resident[Sd15Vae]):
    """An SD1.5 VAE as an Autoencoder. Pictures are decoded one by one."""

    def decode(self, samples: Tensor) -> Iterator[Tensor]:
        """(B, 4, h, w) -> B images (1, 8 h, 8 w, 3) in [0, 1], float32 on the CPU."""
        network = self.network()
        check_latents(samples, axes=2, channels=network.post_quant_conv.weight.shape[1])
        for latent in samples.split(1):
            with torch.no_grad():  # entered anew: between pictures the caller's own state holds
                picture = network.decoder(network.post_quant_conv(latent.to(self.device, self.dtype)))
            yield ((picture.float() + 1.0) / 2.0).clamp(0.0, 1.0).permute(0, 2, 3, 1).cpu()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, 4, H / 8, W / 8); sides are cropped at the centre to a multiple of 8."""
        network, pixels = self.network(), cropped(pixels, SHRINK)
        means = []
        for picture in pixels[..., :3].split(1):
            moved = (picture.permute(0, 3, 1, 2) * 2.0 - 1.0).to(self.device, self.dtype)
            means.append(network.quant_conv(network.encoder(moved)).chunk(2, dim=1)[0].float().cpu())
        return torch.cat(means)


def check_latents(samples: Tensor, *, axes: int, channels: int) -> None:
    """Raises ModelFileUnusable for latents of another family. axes: 2 for pictures, 3 for films."""
    if samples.dim() != 2 + axes or samples.shape[1] != channels:
        needed = f"(batch, {channels}, {'height, width' if axes == 2 else 'frames, height, width'})"
        raise ModelFileUnusable(f"this VAE decodes latents of shape {needed}, not {list(samples.shape)}")


def cropped(pixels: Tensor, step: int) -> Tensor:
    """(…, H, W, C) with both sides cut around the centre to multiples of `step`."""
    height, width = pixels.shape[-3] // step * step, pixels.shape[-2] // step * step
    top, left = pixels.shape[-3] % step // 2, pixels.shape[-2] % step // 2
    return pixels[..., top : top + height, left : left + width, :]


def open_sd15_vae(section: Checkpoint, device: str = "cpu") -> Sd15Autoencoder:
    return Sd15Autoencoder(Source(checkpoint=section, build=Sd15Vae, precision=PRECISION), device)

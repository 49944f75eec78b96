"""The Wan 2.1 film autoencoder: 1 + 4n frames to 1 + n latents an eighth as wide, and back, causal in time.

Frames are decoded latent by latent: each causal convolution remembers the last two frames it saw, so memory does not
grow with the film's length and the result equals that of the whole film at once. The first latent makes one frame,
every later one four. Tensor names are the published ones; which layer stands where is read from them, so thin files
load as well. Source: Wan technical report (arXiv 2503.20314), section 4.1. Arithmetic: `film_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.film_layers import (
    CausalConv,
    FrameConv,
    Memory,
    RmsNorm,
    frames_joined,
    frames_split,
    norm_then_conv,
)
from comfyfleet.engine.models.layers import attention
from comfyfleet.engine.models.residency import Precision, Resident, Source
from comfyfleet.engine.models.sd15_vae import check_latents, cropped

SHRINK = 8
FRAMES_PER_LATENT = 4
PRECISION = Precision(on_cuda=torch.bfloat16)


class FilmResidual(nn.Module):
    """Norm, SiLU, causal convolution, twice; a 1x1x1 shortcut where the width changes."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        super().__init__()
        first, second = section.shape(f"{path}.residual.2.weight"), section.shape(f"{path}.residual.6.weight")
        self.residual = nn.ModuleList(
            [
                RmsNorm(first[1]), nn.Identity(), CausalConv(first),
                RmsNorm(second[1]), nn.Identity(), nn.Identity(), CausalConv(second),
            ]
        )  # fmt: skip
        shortcut = f"{path}.shortcut.weight"
        self.shortcut = CausalConv(section.shape(shortcut)) if shortcut in section else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        first_norm, _, first, second_norm, _, _, second = self.residual
        y = norm_then_conv(first_norm, first, x, memory)
        y = norm_then_conv(second_norm, second, y, memory)
        return y.add_(self.shortcut(x, memory) if isinstance(self.shortcut, CausalConv) else x)


class FilmAttention(nn.Module):
    """One head over the places of each frame by itself."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        super().__init__()
        self.norm = RmsNorm(section.shape(f"{path}.norm.gamma")[0], axes=2)
        self.to_qkv = FrameConv(section.shape(f"{path}.to_qkv.weight"))
        self.proj = FrameConv(section.shape(f"{path}.proj.weight"))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        frames = frames_split(self.norm(x, silu=False))
        q, k, v = self.to_qkv(frames).flatten(2).transpose(1, 2).chunk(3, dim=2)
        mixed = attention(q, k, v, heads=1).transpose(1, 2).reshape(frames.shape)
        return x + frames_joined(self.proj(mixed), x.shape[0])


class FilmUpsample(nn.Module):
    """Twice as wide and high; with a `time_conv` also twice as many frames, except for the film's first."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), FrameConv(section.shape(f"{path}.resample.1.weight"), pad=1)])
        time = f"{path}.time_conv.weight"
        self.time_conv = CausalConv(section.shape(time)) if time in section else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            if memory.has_begun(self):
                pair = self.time_conv(x, memory)  # (B, 2 C, t, h, w): the two frames in the channels
                pair = pair.movedim(1, -1).unflatten(-1, (2, -1))  # (B, t, h, w, 2, C)
                x = pair.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).movedim(-1, 1)
            memory.begin(self)
        frames = F.interpolate(frames_split(x), scale_factor=2.0, mode="nearest")
        return frames_joined(self.resample[1](frames), x.shape[0])


class FilmDownsample(nn.Module):
    """Half as wide and high; with a `time_conv` also half as many frames, except for the film's first."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), FrameConv(section.shape(f"{path}.resample.1.weight"), stride=2)])
        time = f"{path}.time_conv.weight"
        self.time_conv = CausalConv(section.shape(time), stride=2, window=1) if time in section else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        frames = F.pad(frames_split(x), (0, 1, 0, 1))
        x = frames_joined(self.resample[1](frames), x.shape[0])
        if self.time_conv is None:
            return x
        if memory.has_begun(self):
            return self.time_conv(x, memory)
        memory.begin(self)
        memory.remember(self.time_conv, x)
        return x


class FilmHead(nn.ModuleList):
    """Norm, SiLU, causal convolution: the end of both halves."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        shape = section.shape(f"{path}.2.weight")
        super().__init__([RmsNorm(shape[1]), nn.Identity(), CausalConv(shape)])

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        norm, _, conv = self
        return norm_then_conv(norm, conv, x, memory)


class FilmHalf(nn.Module):
    """The encoder or the decoder: `conv1`, `middle` and `head` in both, in their order."""

    def __init__(self, section: Checkpoint, path: str) -> None:
        super().__init__()
        self.conv1 = CausalConv(section.shape(f"{path}.conv1.weight"))
        self.middle = nn.ModuleList(_layer(section, f"{path}.middle.{n}") for n in range(3))
        self.head = FilmHead(section, f"{path}.head")
        self.is_decoder = path == "decoder"
        steps = "upsamples" if self.is_decoder else "downsamples"
        count = section.count(path + "." + steps + ".{}.")
        self.add_module(steps, nn.ModuleList(_layer(section, f"{path}.{steps}.{n}") for n in range(count)))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = self.conv1(x, memory)
        resampling = list(self.get_submodule("upsamples" if self.is_decoder else "downsamples"))
        for layer in [*self.middle, *resampling] if self.is_decoder else [*resampling, *self.middle]:
            x = layer(x, memory)
        return self.head(x, memory)


def _layer(section: Checkpoint, path: str) -> nn.Module:
    """The layer at a place, told by the names there."""
    if f"{path}.residual.2.weight" in section:
        return FilmResidual(section, path)
    if f"{path}.to_qkv.weight" in section:
        return FilmAttention(section, path)
    return FilmUpsample(section, path) if path.startswith("decoder.") else FilmDownsample(section, path)


class WanVae(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.encoder, self.decoder = FilmHalf(section, "encoder"), FilmHalf(section, "decoder")
        self.conv1 = CausalConv(section.shape("conv1.weight"))
        self.conv2 = CausalConv(section.shape("conv2.weight"))

    def decode(self, z: Tensor) -> Iterator[Tensor]:
        """(B, 16, t, h, w) -> parts (B, 3, 1 or 4, 8 h, 8 w) in about [-1, 1], in order."""
        memory = Memory()
        for latent in z.split(1, dim=2):
            yield self.decoder(self.conv2(latent, memory), memory)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> the mean latents (B, 16, 1 + (T - 1) // 4, H / 8, W / 8)."""
        memory = Memory()
        whole = 1 + (x.shape[2] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT  # a rest of frames is left out
        parts = [x[:, :, :1], *x[:, :, 1:whole].split(FRAMES_PER_LATENT, dim=2)] if whole > 1 else [x[:, :, :1]]
        return torch.cat([self.conv1(self.encoder(part, memory), memory).chunk(2, dim=1)[0] for part in parts], dim=2)


class WanAutoencoder(Resident[WanVae]):
    """A Wan 2.1 VAE file as an Autoencoder."""

    def decode(self, samples: Tensor) -> Iterator[Tensor]:
        """(B, 16, t, h, w) -> IMAGE batches (1 or 4, 8 h, 8 w, 3), film after film, float32 on the CPU."""
        network = self.network()
        check_latents(samples, axes=3, channels=network.conv2.weight.shape[1])
        for film in samples.split(1):
            parts = network.decode(film.to(self.device, self.dtype))
            while True:
                with torch.no_grad():  # entered anew: between parts the caller's own state holds
                    part = next(parts, None)
                if part is None:
                    break
                yield part[0].permute(1, 2, 3, 0).float().add_(1.0).mul_(0.5).clamp_(0.0, 1.0).cpu().contiguous()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(T, H, W, 3) in [0, 1] -> (1, 16, 1 + (T - 1) // 4, H / 8, W / 8); sides cropped to multiples of 8."""
        pixels = cropped(pixels, SHRINK)[..., :3]
        film = pixels.permute(3, 0, 1, 2)[None].to(self.device, self.dtype) * 2.0 - 1.0
        return self.network().encode(film).float().cpu()


def open_wan_vae(section: Checkpoint, device: str = "cpu") -> WanAutoencoder:
    return WanAutoencoder(Source(checkpoint=section, build=WanVae, precision=PRECISION), device)

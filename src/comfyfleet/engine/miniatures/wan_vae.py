"""The miniature Wan film autoencoder: the real depth (two residual blocks a level), 4 to 16 channels wide.

Kernels blur in space and time and new frames lie between their neighbours, so that its films are soft clouds of colour
rather than static: easier on the eye, and on the video encoder.
"""

from __future__ import annotations

import torch

from comfyfleet.engine.miniatures.weights import SILU_MEAN, Tensors, Weights
from comfyfleet.engine.models.wan import LATENT_MEAN, LATENT_STD

BASE, MULTIPLIERS, BLOCKS, LATENTS = 4, (1, 2, 4, 4), 2, 16
TIME_STEPS = (False, True, True)  # which encoder levels also halve the frames
PICTURE_GAIN = 0.8


def tensors(seed: int, base: int = BASE) -> tuple[Tensors, dict[str, str]]:
    """The file's tensors and metadata, the same for the same seed."""
    weights = Weights(seed)
    widths = [base * each for each in MULTIPLIERS]
    weights.kernel("conv1", 2 * LATENTS, 2 * LATENTS, 1, 1, 1)
    # Latents come with each channel's own mean and deviation: even them out before anything else.
    mixing = torch.linalg.qr(weights.normal(LATENTS, LATENTS))[0] / torch.tensor(LATENT_STD)
    weights.put("conv2.weight", mixing.view(LATENTS, LATENTS, 1, 1, 1))
    weights.put("conv2.bias", -mixing @ torch.tensor(LATENT_MEAN))
    _encoder(weights.under("encoder."), widths)
    _decoder(weights.under("decoder."), widths[::-1])
    return {name: tensor.to(torch.bfloat16) for name, tensor in weights.tensors.items()}, {}


def _encoder(weights: Weights, widths: list[int]) -> None:
    weights.kernel("conv1", widths[0], 3, 3, 3, 3)
    place, inside = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(BLOCKS):
            _residual(weights.under(f"downsamples.{place}."), inside, width)
            place, inside = place + 1, width
        if level < len(TIME_STEPS):
            weights.kernel(f"downsamples.{place}.resample.1", width, width, 3, 3)
            if TIME_STEPS[level]:
                weights.kernel(f"downsamples.{place}.time_conv", width, width, 3, 1, 1)
            place += 1
    _middle(weights, widths[-1])
    weights.put("head.0.gamma", torch.ones(widths[-1], 1, 1, 1))
    weights.kernel("head.2", 2 * LATENTS, widths[-1], 3, 3, 3)


def _decoder(weights: Weights, widths: list[int]) -> None:
    weights.smooth("conv1", widths[0], LATENTS, 3, 3, 3)
    _middle(weights, widths[0])
    place, inside = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(BLOCKS + 1):
            _residual(weights.under(f"upsamples.{place}."), inside, width)
            place, inside = place + 1, width
        if level < len(TIME_STEPS):
            if TIME_STEPS[::-1][level]:
                _between_frames(weights, f"upsamples.{place}.time_conv", width)
            weights.smooth(f"upsamples.{place}.resample.1", width // 2, width, 3, 3)
            place, inside = place + 1, width // 2
    weights.put("head.0.gamma", torch.ones(widths[-1], 1, 1, 1))
    weights.smooth("head.2", 3, widths[-1], 3, 3, 3, gain=PICTURE_GAIN, mean=SILU_MEAN)
    kernel = weights.tensors[weights.prefix + "head.2.weight"]
    kernel[:, :, 2] = kernel.sum(dim=2)  # the newest frame alone: the film's first has no others behind it
    kernel[:, :, :2] = 0.0


def _between_frames(weights: Weights, name: str, width: int) -> None:
    """Of each pair of new frames the first is half way from the last one, the second is the given one."""
    kernel = torch.zeros(2, width, width, 3, 1, 1)
    kernel[0, range(width), range(width), 1:] = 0.5
    kernel[1, range(width), range(width), 2] = 1.0
    weights.put(f"{name}.weight", kernel.flatten(0, 1))
    weights.put(f"{name}.bias", torch.zeros(2 * width))


def _middle(weights: Weights, width: int) -> None:
    _residual(weights.under("middle.0."), width, width)
    weights.put("middle.1.norm.gamma", torch.ones(width, 1, 1))
    weights.kernel("middle.1.to_qkv", 3 * width, width, 1, 1)
    weights.kernel("middle.1.proj", width, width, 1, 1)
    _residual(weights.under("middle.2."), width, width)


def _residual(weights: Weights, inside: int, width: int) -> None:
    weights.put("residual.0.gamma", torch.ones(inside, 1, 1, 1))
    weights.smooth("residual.2", width, inside, 3, 3, 3, mean=SILU_MEAN)
    weights.put("residual.3.gamma", torch.ones(width, 1, 1, 1))
    weights.smooth("residual.6", width, width, 3, 3, 3, gain=0.3, mean=SILU_MEAN)
    if inside != width:
        weights.kernel("shortcut", width, inside, 1, 1, 1)

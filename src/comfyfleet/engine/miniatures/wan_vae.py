"""The miniature Wan film autoencoder: the real depth (two residual blocks a level), 4 to 16 channels wide."""

from __future__ import annotations

import torch

from comfyfleet.engine.miniatures.weights import Tensors, Weights

BASE, MULTIPLIERS, BLOCKS, LATENTS = 4, (1, 2, 4, 4), 2, 16
TIME_STEPS = (False, True, True)  # which encoder levels also halve the frames
PICTURE_DEVIATION = 0.35  # of the decoded film, in [-1, 1]


def tensors(seed: int, base: int = BASE) -> tuple[Tensors, dict[str, str]]:
    """The file's tensors and metadata, the same for the same seed."""
    weights = Weights(seed)
    widths = [base * each for each in MULTIPLIERS]
    weights.kernel("conv1", 2 * LATENTS, 2 * LATENTS, 1, 1, 1)
    weights.kernel("conv2", LATENTS, LATENTS, 1, 1, 1)
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
    _head(weights, widths[-1], 2 * LATENTS, gain=1.0)


def _decoder(weights: Weights, widths: list[int]) -> None:
    weights.kernel("conv1", widths[0], LATENTS, 3, 3, 3)
    _middle(weights, widths[0])
    place, inside = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(BLOCKS + 1):
            _residual(weights.under(f"upsamples.{place}."), inside, width)
            place, inside = place + 1, width
        if level < len(TIME_STEPS):
            if TIME_STEPS[::-1][level]:
                weights.kernel(f"upsamples.{place}.time_conv", 2 * width, width, 3, 1, 1)
            weights.kernel(f"upsamples.{place}.resample.1", width // 2, width, 3, 3)
            place, inside = place + 1, width // 2
    _head(weights, widths[-1], 3, gain=PICTURE_DEVIATION)


def _middle(weights: Weights, width: int) -> None:
    _residual(weights.under("middle.0."), width, width)
    weights.put("middle.1.norm.gamma", torch.ones(width, 1, 1))
    weights.kernel("middle.1.to_qkv", 3 * width, width, 1, 1)
    weights.kernel("middle.1.proj", width, width, 1, 1)
    _residual(weights.under("middle.2."), width, width)


def _residual(weights: Weights, inside: int, width: int) -> None:
    weights.put("residual.0.gamma", torch.ones(inside, 1, 1, 1))
    weights.kernel("residual.2", width, inside, 3, 3, 3)
    weights.put("residual.3.gamma", torch.ones(width, 1, 1, 1))
    weights.kernel("residual.6", width, width, 3, 3, 3, gain=0.3)
    if inside != width:
        weights.kernel("shortcut", width, inside, 1, 1, 1)


def _head(weights: Weights, inside: int, outside: int, gain: float) -> None:
    weights.put("head.0.gamma", torch.ones(inside, 1, 1, 1))
    weights.kernel("head.2", outside, inside, 3, 3, 3, gain=gain)

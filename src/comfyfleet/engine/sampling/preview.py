"""A rough picture of a latent while it is being sampled: one pixel a latent position, no decoder.

Families with a published linear map from latent channels to colours use it; others show their first three principal
components, whose shapes are right and whose colours are not. Sound has no picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comfyfleet.engine.values import DiffusionModel

# Channels to red, green, blue in [-1, 1], for latents in the network's scale.
# Source: "Decoding latents to RGB without upscaling" (keturn, forum of Hugging Face, 2022), fitted on v1.4.
_SD15_COLOURS = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)


def has_preview(model: DiffusionModel) -> bool:
    return model.family != "ace_step"


def preview(model: DiffusionModel, x0: Tensor) -> Tensor:
    """IMAGE (1, h, w, 3) of the batch's first item (a film's first frame). x0: (B, C, [T,] h, w), network scale."""
    frame = x0[0, :, 0] if x0.dim() == 5 else x0[0]
    channels = frame.detach().float().cpu().movedim(0, -1)
    if model.family == "sd15":
        colours = (channels @ torch.tensor(_SD15_COLOURS) + 1.0) / 2.0
    else:
        colours = _principal_colours(channels)
    return colours.clamp(0.0, 1.0).unsqueeze(0)


def _principal_colours(channels: Tensor) -> Tensor:
    """(h, w, C) -> (h, w, 3): the three directions of most variance, two deviations either side of their mean."""
    points = channels.reshape(-1, channels.shape[-1])
    centred = points - points.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # rising order
    directions = directions[:, -3:].flip(1)
    signs = directions.sum(dim=0).sign()  # an eigenvector's sign is free; this one holds from step to step
    shares = centred @ (directions * torch.where(signs == 0, 1.0, signs))
    deviations = shares.std(dim=0).clamp(min=1e-6)
    return (shares / (4 * deviations) + 0.5).reshape(*channels.shape[:-1], 3)

"""Scaling pictures and latents, with the methods ComfyUI offers. Shapes are (B, C, H, W) or (B, C, T, H, W).

Formulas: PyTorch's interpolation; Lanczos by Pillow on 8-bit pictures; "bislerp" is bilinear interpolation that mixes
directions on the sphere and lengths linearly (Shoemake 1985), along the width and then the height.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comfyfleet.engine.media.pictures import to_bytes


def scale(samples: Tensor, width: int, height: int, method: str, crop: str) -> Tensor:
    """Scale the last two axes to (height, width); `crop` "center" cuts to the new proportions first."""
    if samples.ndim == 5:
        batch, channels, frames = samples.shape[:3]
        flat = samples.movedim(2, 1).reshape(batch * frames, channels, *samples.shape[3:])
        scaled = scale(flat, width, height, method, crop)
        return scaled.reshape(batch, frames, channels, height, width).movedim(1, 2)
    if crop == "center":
        samples = _crop_center(samples, width / height)
    if method == "lanczos":
        return _lanczos(samples, width, height)
    if method == "bislerp":
        return _bislerp(samples, width, height)
    return torch.nn.functional.interpolate(samples, size=(height, width), mode=method)


def _crop_center(samples: Tensor, new_aspect: float) -> Tensor:
    old_height, old_width = samples.shape[-2:]
    old_aspect = old_width / old_height
    x = y = 0
    if old_aspect > new_aspect:
        x = _margin(old_width, new_aspect / old_aspect)
    elif old_aspect < new_aspect:
        y = _margin(old_height, old_aspect / new_aspect)
    return samples[..., y : old_height - y, x : old_width - x]


def _margin(side: int, kept: float) -> int:
    """What goes from each end of a side of which a share is kept."""
    return round((side - side * kept) / 2)


def _lanczos(samples: Tensor, width: int, height: int) -> Tensor:
    pictures = [Image.fromarray(to_bytes(sample.movedim(0, -1))) for sample in samples]
    scaled = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    return torch.stack([torch.from_numpy(np.asarray(one).astype(np.float32) / 255.0).movedim(-1, 0) for one in scaled])


def _bislerp(samples: Tensor, width: int, height: int) -> Tensor:
    along_width = _slerp_last_axis(samples.float(), width)
    scaled = _slerp_last_axis(along_width.transpose(-1, -2), height).transpose(-1, -2)
    return scaled.to(samples.dtype)


def _slerp_last_axis(samples: Tensor, length: int) -> Tensor:
    """(B, C, A, old) -> (B, C, A, length): each new place is a mix of its two neighbours' channel vectors."""
    old = samples.shape[-1]
    places = torch.arange(old, dtype=torch.float32).reshape(1, 1, 1, -1)
    where = torch.nn.functional.interpolate(places, size=(1, length), mode="bilinear")
    following = torch.arange(old, dtype=torch.float32).reshape(1, 1, 1, -1) + 1
    following[..., -1] -= 1
    after = torch.nn.functional.interpolate(following, size=(1, length), mode="bilinear").to(torch.int64).flatten()
    before = where.to(torch.int64).flatten()
    share = (where - where.floor()).reshape(1, 1, 1, -1)
    return _slerp(samples[..., before], samples[..., after], share)


def _slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Between channel vectors (axis 1); `share` is how far towards the second."""
    first_length = first.norm(dim=1, keepdim=True)
    second_length = second.norm(dim=1, keepdim=True)
    first_unit = torch.where(first_length == 0, torch.zeros_like(first), first / first_length)
    second_unit = torch.where(second_length == 0, torch.zeros_like(second), second / second_length)
    cosine = (first_unit * second_unit).sum(1, keepdim=True)
    angle = torch.acos(cosine)
    mixed = (torch.sin((1 - share) * angle) * first_unit + torch.sin(share * angle) * second_unit) / torch.sin(angle)
    mixed = mixed * (first_length * (1 - share) + second_length * share)
    mixed = torch.where(cosine > 1 - 1e-5, first, mixed)  # the same direction: no angle to divide by
    return torch.where(cosine < 1e-5 - 1, first * (1 - share) + second * share, mixed)

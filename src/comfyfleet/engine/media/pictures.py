"""Pictures to and from files. An IMAGE is (B, H, W, 3) float in [0, 1]; bytes are rounded towards zero."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, PngImagePlugin
from torch import Tensor

PNG_LEVEL = 4
PREVIEW_SIDE = 512
PREVIEW_QUALITY = 95
EXIF_MODEL, EXIF_MAKE = 0x0110, 0x010F
NO_MASK_SIDE = 64  # ComfyUI's empty mask


def to_bytes(frame: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One frame (H, W, C) float to (H, W, C) uint8: trunc(255 x), clipped."""
    return (frame.detach().float().cpu() * 255.0).clamp_(0, 255).to(torch.uint8).numpy()


def from_picture(picture: Image.Image) -> Tensor:
    """A Pillow picture to IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0)[None]


def metadata_texts(prompt: Mapping[str, Any], extra_pnginfo: Mapping[str, Any]) -> dict[str, str]:
    """What a saved file says of its making: the prompt and each extra key, as JSON."""
    texts = {"prompt": json.dumps(prompt)}
    texts.update({name: json.dumps(value) for name, value in extra_pnginfo.items()})
    return texts


def save_png(path: str, frame: Tensor, texts: Mapping[str, str], level: int = PNG_LEVEL) -> None:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.fromarray(to_bytes(frame)).save(path, format="PNG", pnginfo=info, compress_level=level)


def save_webp(
    path: str,
    frames: Tensor,
    *,
    fps: float,
    lossless: bool,
    quality: int,
    method: int,
    texts: Mapping[str, str],
) -> None:
    """An animated WebP; the prompt stands in EXIF Model, other texts from Make downwards."""
    pictures = [Image.fromarray(to_bytes(frame)) for frame in frames]
    exif = pictures[0].getexif()
    tag = EXIF_MAKE
    for name, text in texts.items():
        if name == "prompt":
            exif[EXIF_MODEL] = f"prompt:{text}"
        else:
            exif[tag] = f"{name}:{text}"
            tag -= 1
    pictures[0].save(
        path,
        format="WEBP",
        save_all=True,
        duration=int(1000.0 / fps),
        append_images=pictures[1:],
        exif=exif,
        lossless=lossless,
        quality=quality,
        method=method,
    )


def load_picture(path: str) -> tuple[Tensor, Tensor]:
    """(IMAGE, MASK) of all frames that have the first one's size. The mask is 1 where the picture is transparent."""
    with Image.open(path) as file:
        frames, masks = [], []
        size = None
        for page in ImageSequence.Iterator(file):
            picture = ImageOps.exif_transpose(page)
            if picture.mode == "I":  # 16 or 32 bit grey: scaled down before it is cut to 8 bits
                picture = picture.point(lambda value: value * (1 / 255))
            size = size or picture.size
            if picture.size != size:
                continue
            frames.append(from_picture(picture))
            masks.append(_mask(picture))
            if file.format == "MPO":
                break
    return torch.cat(frames), torch.cat(masks)


def _mask(picture: Image.Image) -> Tensor:
    if "A" in picture.getbands():
        alpha = picture.getchannel("A")
    elif picture.mode == "P" and "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
    else:
        return torch.zeros((1, NO_MASK_SIDE, NO_MASK_SIDE), dtype=torch.float32)
    return 1.0 - torch.from_numpy(np.asarray(alpha).astype(np.float32) / 255.0)[None]


def whole_png(frame: Tensor) -> bytes:
    """A frame (H, W, 3) as PNG, small in effort rather than in size: it goes over a socket to this machine."""
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(frame)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def preview_jpeg(image: Tensor | None) -> bytes | None:
    """A small IMAGE (its first picture) as JPEG, scaled to fit 512 pixels a side as ComfyUI's previews are."""
    if image is None:
        return None
    frame = image[0] if image.ndim == 4 else image
    picture = Image.fromarray(to_bytes(frame))
    scale = PREVIEW_SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BILINEAR).save(buffer, format="JPEG", quality=PREVIEW_QUALITY)
    return buffer.getvalue()

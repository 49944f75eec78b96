"""Pictures: made, loaded, scaled, shown and saved. IMAGE is (B, H, W, 3) float32 in [0, 1]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comfyfleet.engine.media.pictures import load_picture, metadata_texts, save_png, save_webp
from comfyfleet.engine.nodes.pieces import changed
from comfyfleet.engine.nodes.scaling import scale
from comfyfleet.engine.registry import (
    METADATA,
    InputFiles,
    NodeRegistry,
    NodeRun,
    Shown,
    boolean,
    choice,
    integer,
    link,
    real,
    text,
)

NODES = NodeRegistry()
MAX_SIDE = 16384
PREFIX_TIP = "The name of the file, with sub-folders; %width%, %height% and %year% to %second% are filled in."


@NODES.node(
    "EmptyImage",
    inputs={
        "width": integer(512, 1, MAX_SIDE, step=1),
        "height": integer(512, 1, MAX_SIDE, step=1),
        "batch_size": integer(1, 1, 4096),
        "color": integer(0, 0, 0xFFFFFF, step=1, display="color"),
    },
    outputs=["IMAGE"],
    category="image",
)
def empty_image(run: NodeRun, *, width: int, height: int, batch_size: int, color: int) -> tuple[Tensor]:
    """One colour, 0xRRGGBB."""
    channels = [((color >> shift) & 0xFF) / 0xFF for shift in (16, 8, 0)]
    return (torch.tensor(channels).expand(batch_size, height, width, 3).contiguous(),)


@NODES.node(
    "LoadImage",
    inputs={"image": choice(InputFiles(media="image", refusal="Invalid image file: {}"), image_upload=True)},
    outputs=["IMAGE", "MASK"],
    category="image",
    display_name="Load Image",
)
def load_image(run: NodeRun, *, image: str) -> tuple[Tensor, Tensor]:
    return load_picture(run.folders.input_path(image))


@NODES.node(
    "ImageScale",
    inputs={
        "image": link("IMAGE"),
        "upscale_method": choice(["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]),
        "width": integer(512, 0, MAX_SIDE, step=1),
        "height": integer(512, 0, MAX_SIDE, step=1),
        "crop": choice(["disabled", "center"]),
    },
    outputs=["IMAGE"],
    category="image/upscaling",
    display_name="Upscale Image",
)
def image_scale(
    run: NodeRun, *, image: Tensor, upscale_method: str, width: int, height: int, crop: str
) -> tuple[Tensor]:
    """A side of 0 keeps the proportions; both 0 keep the picture."""
    if width == 0 and height == 0:
        return (image,)
    new_width = width or max(1, round(image.shape[2] * height / image.shape[1]))
    new_height = height or max(1, round(image.shape[1] * new_width / image.shape[2]))

    def scaled(frames: Tensor) -> Tensor:
        return scale(frames.movedim(-1, 1), new_width, new_height, upscale_method, crop).movedim(1, -1)

    return (changed(run, image, scaled),)


@NODES.node(
    "SaveImage",
    inputs={
        "images": link("IMAGE", tooltip="The images to save."),
        "filename_prefix": text("ComfyUI", tooltip=PREFIX_TIP),
    },
    category="image",
    display_name="Save Image",
    description="Saves the pictures to the output folder.",
    is_output=True,
    hidden=METADATA,
)
def save_image(run: NodeRun, *, images: Tensor, filename_prefix: str) -> Shown:
    return _save_pngs(run, images, filename_prefix, kind="output", level=4)


@NODES.node(
    "PreviewImage",
    inputs={"images": link("IMAGE")},
    category="image",
    display_name="Preview Image",
    description="Shows the pictures without keeping them.",
    is_output=True,
    hidden=METADATA,
)
def preview_image(run: NodeRun, *, images: Tensor) -> Shown:
    return _save_pngs(run, images, "ComfyUI" + run.folders.temp_suffix(), kind="temp", level=1)


@NODES.node(
    "SaveImageWebsocket",
    inputs={"images": link("IMAGE")},
    category="api/image",
    is_output=True,
    is_volatile=True,
)
def save_image_websocket(run: NodeRun, *, images: Tensor) -> tuple[()]:
    """Sends the pictures to whoever listens, whole; writes nothing and is never answered from the cache."""
    for number, frame in enumerate(images):
        run.send_picture(number, len(images), frame)
    return ()


def _save_pngs(run: NodeRun, images: Tensor, prefix: str, *, kind: str, level: int) -> Shown:
    texts = metadata_texts(run.prompt, run.extra_pnginfo)
    height, width = images.shape[1], images.shape[2]
    shown = []
    for number, frame in enumerate(images):
        name = run.folders.next_output(prefix, "png", kind=kind, width=width, height=height, batch_number=number)
        save_png(name.staging_path, frame, texts, level)
        run.commit(name)
        shown.append(name.shown())
    return Shown(ui={"images": shown})


WEBP_METHODS = {"default": 4, "fastest": 0, "slowest": 6}


@NODES.node(
    "SaveAnimatedWEBP",
    inputs={
        "images": link("IMAGE"),
        "filename_prefix": text("ComfyUI"),
        "fps": real(6.0, 0.01, 1000.0, step=0.01),
        "lossless": boolean(True),
        "quality": integer(80, 0, 100),
        "method": choice(list(WEBP_METHODS)),
    },
    category="image/animation",
    is_output=True,
    hidden=METADATA,
)
def save_animated_webp(
    run: NodeRun, *, images: Tensor, filename_prefix: str, fps: float, lossless: bool, quality: int, method: str
) -> Shown:
    name = run.folders.next_output(filename_prefix, "webp", width=images.shape[2], height=images.shape[1])
    options: dict[str, Any] = {"lossless": lossless, "quality": quality, "method": WEBP_METHODS[method]}
    save_webp(name.staging_path, images, fps=fps, texts=metadata_texts(run.prompt, run.extra_pnginfo), **options)
    run.commit(name)
    return Shown(ui={"images": [name.shown()], "animated": [len(images) != 1]})

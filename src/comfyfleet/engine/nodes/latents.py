"""Latents: empty ones for each model family, kept in files, cut, repeated, scaled. Values: `engine.values.Latent`."""

from __future__ import annotations

import dataclasses
import json

import safetensors.torch
import torch

from comfyfleet.engine.nodes.scaling import scale
from comfyfleet.engine.registry import (
    METADATA,
    InputFiles,
    NodeRegistry,
    NodeRun,
    Shown,
    choice,
    integer,
    link,
    real,
    text,
)
from comfyfleet.engine.values import Latent

NODES = NodeRegistry()
MAX_SIDE = 16384
SMALLEST_SIDE = 64  # LatentUpscale never goes below, in pixels
PIXELS_PER_CELL = 8
WAN_CHANNELS, WAN_FRAMES_PER_STEP = 16, 4
ACE_RATE_HZ = 44100
OLD_LATENT_SCALE = 1.0 / 0.18215  # files written before the format had a version


@NODES.node(
    "EmptyLatentImage",
    inputs={
        "width": integer(512, 16, MAX_SIDE, step=8, tooltip="Pixels across."),
        "height": integer(512, 16, MAX_SIDE, step=8, tooltip="Pixels down."),
        "batch_size": integer(1, 1, 4096, tooltip="How many at once."),
    },
    outputs=["LATENT"],
    category="latent",
    display_name="Empty Latent Image",
)
def empty_latent_image(run: NodeRun, *, width: int, height: int, batch_size: int) -> tuple[Latent]:
    """Zeros (B, 4, H/8, W/8): SD1.5."""
    return (Latent(samples=torch.zeros(batch_size, 4, height // PIXELS_PER_CELL, width // PIXELS_PER_CELL)),)


@NODES.node(
    "EmptyHunyuanLatentVideo",
    inputs={
        "width": integer(848, 16, MAX_SIDE, step=16),
        "height": integer(480, 16, MAX_SIDE, step=16),
        "length": integer(25, 1, MAX_SIDE, step=4),
        "batch_size": integer(1, 1, 4096),
    },
    outputs=["LATENT"],
    category="latent/video",
)
def empty_video_latent(run: NodeRun, *, width: int, height: int, length: int, batch_size: int) -> tuple[Latent]:
    """Zeros (B, 16, (length - 1) // 4 + 1, H/8, W/8): Wan."""
    steps = (length - 1) // WAN_FRAMES_PER_STEP + 1
    shape = (batch_size, WAN_CHANNELS, steps, height // PIXELS_PER_CELL, width // PIXELS_PER_CELL)
    return (Latent(samples=torch.zeros(shape)),)


@NODES.node(
    "EmptyAceStepLatentAudio",
    inputs={
        "seconds": real(120.0, 1.0, 1000.0, step=0.1),
        "batch_size": integer(1, 1, 4096, tooltip="How many at once."),
    },
    outputs=["LATENT"],
    category="latent/audio",
)
def empty_ace_latent(run: NodeRun, *, seconds: float, batch_size: int) -> tuple[Latent]:
    """Zeros (B, 8, 16, columns): ACE-Step, a column per 4,096 samples at 44.1 kHz."""
    return (Latent(samples=torch.zeros(batch_size, 8, 16, int(seconds * ACE_RATE_HZ / 512 / 8))),)


@NODES.node(
    "LatentUpscale",
    inputs={
        "samples": link("LATENT"),
        "upscale_method": choice(["nearest-exact", "bilinear", "area", "bicubic", "bislerp"]),
        "width": integer(512, 0, MAX_SIDE, step=8),
        "height": integer(512, 0, MAX_SIDE, step=8),
        "crop": choice(["disabled", "center"]),
    },
    outputs=["LATENT"],
    category="latent",
    display_name="Upscale Latent",
)
def latent_upscale(
    run: NodeRun, *, samples: Latent, upscale_method: str, width: int, height: int, crop: str
) -> tuple[Latent]:
    """Sides in pixels. A side of 0 keeps the proportions; both 0 keep the latent."""
    if width == 0 and height == 0:
        return (samples,)
    old_height, old_width = samples.samples.shape[-2:]
    if width == 0:
        height = max(SMALLEST_SIDE, height)
        width = max(SMALLEST_SIDE, round(old_width * height / old_height))
    elif height == 0:
        width = max(SMALLEST_SIDE, width)
        height = max(SMALLEST_SIDE, round(old_height * width / old_width))
    else:
        width, height = max(SMALLEST_SIDE, width), max(SMALLEST_SIDE, height)
    scaled = scale(samples.samples, width // PIXELS_PER_CELL, height // PIXELS_PER_CELL, upscale_method, crop)
    return (dataclasses.replace(samples, samples=scaled),)


@NODES.node(
    "LatentFromBatch",
    inputs={"samples": link("LATENT"), "batch_index": integer(0, 0, 63), "length": integer(1, 1, 64)},
    outputs=["LATENT"],
    category="latent/batch",
    display_name="Latent From Batch",
)
def latent_from_batch(run: NodeRun, *, samples: Latent, batch_index: int, length: int) -> tuple[Latent]:
    """Some items of a batch; they remember their place, so their noise is what it would have been in the batch."""
    count = samples.samples.shape[0]
    start = min(count - 1, batch_index)
    stop = start + min(count - start, length)
    places = samples.batch_index if samples.batch_index is not None else tuple(range(count))
    mask = samples.noise_mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[start:stop]
    return (Latent(samples=samples.samples[start:stop], noise_mask=mask, batch_index=places[start:stop]),)


@NODES.node(
    "RepeatLatentBatch",
    inputs={"samples": link("LATENT"), "amount": integer(1, 1, 64)},
    outputs=["LATENT"],
    category="latent/batch",
    display_name="Repeat Latent Batch",
)
def repeat_latent_batch(run: NodeRun, *, samples: Latent, amount: int) -> tuple[Latent]:
    """The whole batch, several times; known places go on counting behind the batch."""
    given = samples.samples
    mask = samples.noise_mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask.repeat(amount, *[1] * (mask.ndim - 1))
    places = samples.batch_index
    if places is not None:
        span = max(places) - min(places) + 1
        places = tuple(place + turn * span for turn in range(amount) for place in places)
    repeated = given.repeat(amount, *[1] * (given.ndim - 1))
    return (Latent(samples=repeated, noise_mask=mask, batch_index=places),)


@NODES.node(
    "SaveLatent",
    inputs={"samples": link("LATENT"), "filename_prefix": text("latents/ComfyUI")},
    category="_for_testing",
    is_output=True,
    hidden=METADATA,
)
def save_latent(run: NodeRun, *, samples: Latent, filename_prefix: str) -> Shown:
    name = run.folders.next_output(filename_prefix, "latent")
    metadata = {"prompt": json.dumps(run.prompt)} | {key: json.dumps(value) for key, value in run.extra_pnginfo.items()}
    tensors = {"latent_tensor": samples.samples.contiguous(), "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(tensors, name.staging_path, metadata=metadata)
    run.commit(name)
    return Shown(ui={"latents": [name.shown()]})


@NODES.node(
    "LoadLatent",
    inputs={"latent": choice(InputFiles(media="latent", refusal="Invalid latent file: {}"))},
    outputs=["LATENT"],
    category="_for_testing",
)
def load_latent(run: NodeRun, *, latent: str) -> tuple[Latent]:
    tensors = safetensors.torch.load_file(run.folders.input_path(latent))
    factor = 1.0 if "latent_format_version_0" in tensors else OLD_LATENT_SCALE
    return (Latent(samples=tensors["latent_tensor"].float() * factor),)

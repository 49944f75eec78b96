"""Pictures changed and put together: inverted, blurred, batched, repeated, taken out. IMAGE is (B, H, W, 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from comfyfleet.engine.nodes.pieces import changed
from comfyfleet.engine.nodes.scaling import scale
from comfyfleet.engine.registry import NodeRegistry, NodeRun, integer, link, real

NODES = NodeRegistry()


@NODES.node(
    "ImageInvert",
    inputs={"image": link("IMAGE")},
    outputs=["IMAGE"],
    category="image",
    display_name="Invert Image",
)
def invert(run: NodeRun, *, image: Tensor) -> tuple[Tensor]:
    return (changed(run, image, lambda frames: 1.0 - frames),)


@NODES.node(
    "ImageBlur",
    inputs={
        "image": link("IMAGE"),
        "blur_radius": integer(1, 1, 31, step=1),
        "sigma": real(1.0, 0.1, 10.0, step=0.1),
    },
    outputs=["IMAGE"],
    category="image/postprocessing",
)
def blur(run: NodeRun, *, image: Tensor, blur_radius: int, sigma: float) -> tuple[Tensor]:
    """A Gaussian over 2 radius + 1 pixels, which span [-1, 1] whatever the radius; edges are mirrored."""
    side = torch.linspace(-1.0, 1.0, 2 * blur_radius + 1)
    bell = torch.exp(-(side[:, None] ** 2 + side[None, :] ** 2) / (2.0 * sigma**2))
    kernel = (bell / bell.sum()).expand(image.shape[-1], 1, -1, -1)

    def blurred(frames: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(frames.movedim(-1, 1), [blur_radius] * 4, mode="reflect")
        return torch.nn.functional.conv2d(padded, kernel, groups=frames.shape[-1]).movedim(1, -1)

    return (changed(run, image, blurred),)


@NODES.node(
    "ImageBatch",
    inputs={"image1": link("IMAGE"), "image2": link("IMAGE")},
    outputs=["IMAGE"],
    category="image",
    display_name="Batch Images",
)
def batch(run: NodeRun, *, image1: Tensor, image2: Tensor) -> tuple[Tensor]:
    """Both, one after the other; the second is cut and scaled to the first one's size."""
    if image1.shape[1:] != image2.shape[1:]:
        height, width = image1.shape[1:3]
        image2 = scale(image2.movedim(-1, 1), width, height, "bilinear", "center").movedim(1, -1)
    return (torch.cat([image1, image2]),)


@NODES.node(
    "RepeatImageBatch",
    inputs={"image": link("IMAGE"), "amount": integer(1, 1, 4096)},
    outputs=["IMAGE"],
    category="image/batch",
)
def repeat(run: NodeRun, *, image: Tensor, amount: int) -> tuple[Tensor]:
    return (image.repeat(amount, 1, 1, 1),)


@NODES.node(
    "ImageFromBatch",
    inputs={"image": link("IMAGE"), "batch_index": integer(0, 0, 4095), "length": integer(1, 1, 4096)},
    outputs=["IMAGE"],
    category="image/batch",
)
def take(run: NodeRun, *, image: Tensor, batch_index: int, length: int) -> tuple[Tensor]:
    start = min(len(image) - 1, batch_index)
    return (image[start : start + length].clone(),)

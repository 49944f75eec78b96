"""What diffusion networks ask of an encoded prompt: the right width, and as many rows as there are latents."""

from __future__ import annotations

import math

from torch import Tensor

from comfyfleet.wire.errors import ModelFileUnusable


def check_text_width(embedding: Tensor, needed: int) -> None:
    """Raises ModelFileUnusable for a prompt from another family's text encoder."""
    found = embedding.shape[-1]
    if found != needed:
        raise ModelFileUnusable(
            f"this prompt was encoded {found} numbers wide and the diffusion model reads {needed}: "
            "use the text encoder that belongs to the model",
            found=found,
            needed=needed,
        )


def expand(x: Tensor, batch: int) -> Tensor:
    """Broadcast the first axis to `batch`, repeating what is there when it is neither 1 nor `batch`."""
    if x.shape[0] == batch:
        return x
    if x.shape[0] == 1:
        return x.expand(batch, *x.shape[1:])
    return x.repeat(math.ceil(batch / x.shape[0]), *[1] * (x.ndim - 1))[:batch]

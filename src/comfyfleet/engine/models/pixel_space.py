"""The autoencoder that is none: pictures themselves as latents, for models that work on pixels.

Latents are (B, 3, H, W) in [-1, 1]; nothing is learned and nothing is in a file.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from comfyfleet.engine.models.sd15_vae import check_latents

PIXEL_SPACE = "pixel_space"  # its name among the files of the vae folder


class PixelSpace:
    """An Autoencoder (`engine.values`)."""

    key = PIXEL_SPACE
    size_bytes = 0

    def decode(self, samples: Tensor) -> Iterator[Tensor]:
        """(B, 3, H, W) -> B images (1, H, W, 3) in [0, 1]."""
        check_latents(samples, axes=2, channels=3)
        for latent in samples.float().split(1):
            yield ((latent + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1).cpu()

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, 3, H, W)."""
        return (pixels[..., :3].movedim(-1, 1) * 2.0 - 1.0).float().cpu()

    def move_to(self, device: str) -> None:
        """There is nothing to move."""

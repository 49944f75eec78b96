"""A latent being sampled can be looked at: right size, right range, shapes visible."""

from dataclasses import replace

import pytest
import torch

from comfyfleet.engine.sampling.preview import has_preview, preview

from .analytic import a_model


@pytest.mark.parametrize(
    ("family", "shape"), [("sd15", (2, 4, 6, 9)), ("wan", (1, 16, 3, 6, 9)), ("unknown", (1, 8, 6, 9))]
)
def test_a_preview_is_one_small_image_of_the_first_item(family, shape):
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3

    image = preview(replace(a_model(), family=family), latent)

    assert image.shape == (1, 6, 9, 3)
    assert image.dtype == torch.float32
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    assert float(image.std()) > 0.05


def test_a_shape_in_the_latent_is_seen_in_the_preview():
    latent = torch.randn((1, 16, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 0.1
    latent[:, :5, :, :, 4:] += 3.0

    image = preview(replace(a_model(), family="wan"), latent)

    left, right = image[0, :, :4].mean(dim=(0, 1)), image[0, :, 4:].mean(dim=(0, 1))
    assert float((left - right).abs().max()) > 0.3


def test_an_even_latent_has_an_even_preview_and_sound_has_none():
    wan = replace(a_model(), family="wan")

    assert torch.allclose(preview(wan, torch.zeros(1, 16, 1, 4, 4)), torch.full((1, 4, 4, 3), 0.5))
    assert has_preview(wan)
    assert not has_preview(replace(wan, family="ace_step"))

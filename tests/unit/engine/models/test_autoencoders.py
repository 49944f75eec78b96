"""Films and pictures from latents, against ComfyUI's own, and the two roads to the same film."""

from __future__ import annotations

import pytest
import torch

from comfyfleet.engine.models import film_layers
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.film_layers import Memory, RmsNorm
from comfyfleet.engine.models.sd15_vae import open_sd15_vae
from comfyfleet.engine.models.wan_vae import open_wan_vae
from comfyfleet.wire.errors import ModelFileUnusable
from engine_goldens import MODELS, relative_error, tensors


def a_film_vae():
    return open_wan_vae(open_checkpoint(MODELS / "vae" / "golden_wan_vae.safetensors"))


def a_picture_vae():
    checkpoint = open_checkpoint(MODELS / "checkpoints" / "golden_sd15.safetensors")
    return open_sd15_vae(checkpoint.section("first_stage_model."))


def test_a_film_equals_comfyui():
    units = tensors("wan/units")

    frames = torch.cat(list(a_film_vae().decode(units["vae.latent"])))

    assert relative_error(frames, units["vae.frames"]) <= 1e-5


def test_frames_come_latent_by_latent_one_and_then_four_at_a_time():
    parts = list(a_film_vae().decode(torch.randn(2, 16, 3, 2, 3, generator=torch.Generator().manual_seed(0))))

    assert [tuple(part.shape) for part in parts] == [(1, 16, 24, 3), (4, 16, 24, 3), (4, 16, 24, 3)] * 2
    assert all(part.min() >= 0.0 and part.max() <= 1.0 for part in parts)


def test_the_processors_own_road_gives_the_same_film(monkeypatch):
    vae, latent = a_film_vae(), torch.randn(1, 16, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    frames = torch.cat(list(vae.decode(latent)))
    encoded = vae.encode(frames)

    monkeypatch.setattr(film_layers, "on_cpu_road", lambda x: False)

    assert relative_error(torch.cat(list(vae.decode(latent))), frames) <= 1e-5
    assert relative_error(vae.encode(frames), encoded) <= 1e-5


@pytest.mark.parametrize("width", [3, 4, 5, 32, 96])
def test_the_channel_norm_is_one_norm_on_both_roads(monkeypatch, width):
    norm = RmsNorm(width)
    norm.gamma = torch.nn.Parameter(torch.randn(width, 1, 1, 1), requires_grad=False)
    x = torch.randn(1, width, 2, 7, 5).contiguous(memory_format=torch.channels_last_3d)
    ours = norm(x, silu=True)

    monkeypatch.setattr(film_layers, "on_cpu_road", lambda x: False)

    assert torch.allclose(ours, norm(x, silu=True), atol=1e-5)


def test_a_film_of_odd_length_is_encoded_without_its_rest():
    vae = a_film_vae()
    film = torch.rand(7, 21, 16, 3, generator=torch.Generator().manual_seed(2))

    latent = vae.encode(film)

    assert latent.shape == (1, 16, 2, 2, 2)
    assert torch.equal(latent, vae.encode(film[:5, 2:18]))


def test_a_picture_equals_comfyui():
    units = tensors("sd15/units")

    picture = torch.cat(list(a_picture_vae().decode(units["vae.latent"])))

    assert relative_error(picture, units["vae.image"]) <= 1e-5


def test_a_picture_is_cropped_at_its_centre_to_multiples_of_eight():
    vae = a_picture_vae()
    pictures = torch.rand(2, 21, 19, 3, generator=torch.Generator().manual_seed(3))

    latent = vae.encode(pictures)

    assert latent.shape == (2, 4, 2, 2)
    assert torch.equal(latent, vae.encode(pictures[:, 2:18, 1:17]))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 3, 8, 8)])
def test_latents_of_another_family_are_refused_with_both_shapes(shape):
    with pytest.raises(ModelFileUnusable, match=r"\(batch, 16, frames, height, width\), not \[1, 4"):
        next(a_film_vae().decode(torch.zeros(shape)))


def test_what_is_remembered_between_frames_does_not_grow_with_the_film():
    network = a_film_vae().network()
    film = torch.randn(1, 16, 6, 2, 2, generator=torch.Generator().manual_seed(4))
    memory, sizes = Memory(), []

    with torch.no_grad():
        for latent in film.split(1, dim=2):
            network.decoder(network.conv2(latent, memory), memory)
            sizes.append(memory.size_bytes)

    assert sizes[1] == sizes[-1] > 0

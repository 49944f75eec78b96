"""From a file's path to models: told from the file, refused with what it is instead."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.open_file import open_all_in_one, open_diffusion, open_text_encoder, open_vae
from comfyfleet.wire.errors import ModelFileUnusable
from engine_goldens import MODELS

WAN = str(MODELS / "diffusion_models" / "golden_wan_high.safetensors")
WAN_VAE = str(MODELS / "vae" / "golden_wan_vae.safetensors")
UMT5 = str(MODELS / "text_encoders" / "golden_umt5.safetensors")
SD15 = str(MODELS / "checkpoints" / "golden_sd15.safetensors")


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (lambda: open_all_in_one(WAN, "cpu"), "golden_wan_high.safetensors is a Wan diffusion model"),
        (lambda: open_diffusion(WAN_VAE, "cpu"), "is a Wan 2.1 VAE; here a Wan diffusion model"),
        (lambda: open_vae(UMT5, "cpu"), "is a UMT5 text encoder; here a Wan 2.1 VAE"),
        (lambda: open_text_encoder(WAN, "wan", "cpu"), "is a Wan diffusion model; here a UMT5 text encoder"),
        (lambda: open_text_encoder(UMT5, "stable_diffusion", "cpu"), "no text encoder of type stable_diffusion"),
        (lambda: open_text_encoder(UMT5, "flux2", "cpu"), "no text encoder of type flux2"),
    ],
)
def test_a_file_in_the_wrong_loader_is_named_for_what_it_is(opened, said):
    with pytest.raises(ModelFileUnusable, match=said):
        opened()


def test_a_checkpoint_without_its_vae_says_so(tmp_path):
    given = open_checkpoint(SD15)
    made = {name: given.tensor(name).clone() for name in given if not name.startswith("first_stage_model.")}
    save_file(made, tmp_path / "no_vae.safetensors")

    with pytest.raises(ModelFileUnusable, match="has no VAE inside"):
        open_all_in_one(str(tmp_path / "no_vae.safetensors"), "cpu")


def test_an_all_in_one_file_gives_a_diffusion_model_to_its_own_loader_too():
    alone, (model, _, _) = open_diffusion(SD15, "cpu"), open_all_in_one(SD15, "cpu")

    assert alone.family == model.family == "sd15"
    assert alone.network.key == model.network.key


@pytest.mark.parametrize(
    ("weight_dtype", "stored"),
    [("fp8_e4m3fn", torch.float8_e4m3fn), ("fp8_e4m3fn_fast", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_a_weight_dtype_rounds_the_weights_on_loading(weight_dtype, stored):
    given = open_checkpoint(WAN).tensor("blocks.0.ffn.0.weight")

    network = open_diffusion(WAN, "cpu", weight_dtype).network

    loaded = network.network().blocks[0].ffn[0].weight
    assert network.key != open_diffusion(WAN, "cpu").network.key
    assert torch.equal(loaded, given.to(stored).float())
    assert not torch.equal(loaded, given.float())
    patches = network.network().patch_embedding.weight  # this one ComfyUI always holds in float32
    assert torch.equal(patches, open_checkpoint(WAN).tensor("patch_embedding.weight").float())


def test_a_text_encoder_asked_to_stay_on_the_cpu_stays():
    encoder = open_text_encoder(UMT5, "wan", "cpu", is_pinned=True)

    encoder.move_to("cuda:0")

    assert encoder.device == "cpu"


def test_opening_reads_no_weights():
    model = open_diffusion(WAN, "cpu")

    assert model.network._network is None
    assert model.network.size_bytes == open_checkpoint(WAN).size_bytes

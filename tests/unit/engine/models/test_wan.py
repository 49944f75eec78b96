"""The Wan transformer against ComfyUI's own numbers, and the traps of its files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.wan import PRECISION, WanLatentFormat, open_wan
from comfyfleet.engine.values import ConditioningEntry
from comfyfleet.wire.errors import ModelFileUnusable
from engine_goldens import MODELS, relative_error, tensors

FILES = ["golden_wan_high", "golden_wan_low", "golden_wan_high_fp8_scaled", "golden_wan_low_fp8_scaled"]


def a_network(name, **precision):
    network = open_wan(open_checkpoint(MODELS / "diffusion_models" / f"{name}.safetensors"))
    network.source = replace(network.source, precision=replace(PRECISION, **precision))
    return network


@pytest.mark.parametrize("widen_limit_bytes", [0, 2**31], ids=["weights as stored", "weights widened"])
@pytest.mark.parametrize("name", FILES)
def test_a_forward_equals_comfyui(name, widen_limit_bytes):
    units, network = tensors("wan/units"), a_network(name, widen_limit_bytes=widen_limit_bytes)

    for number in range(2):
        given = {part: units[f"{name}.{number}.{part}"] for part in ("x", "timestep", "context", "output")}
        velocity = network.forward(given["x"], given["timestep"], ConditioningEntry(embedding=given["context"]))
        assert relative_error(velocity, given["output"]) <= 1e-5


def test_without_rounding_the_biases_of_fp8_layers_the_result_is_another():
    units, name = tensors("wan/units"), "golden_wan_high_fp8_scaled"
    network = a_network(name, fp8_bias=False)

    velocity = network.forward(
        units[f"{name}.0.x"], units[f"{name}.0.timestep"], ConditioningEntry(embedding=units[f"{name}.0.context"])
    )

    assert relative_error(velocity, units[f"{name}.0.output"]) > 1e-3


def test_the_scale_of_fp8_weights_is_applied():
    checkpoint = open_checkpoint(MODELS / "diffusion_models" / "golden_wan_high_fp8_scaled.safetensors")
    name = "blocks.0.self_attn.q"
    true = checkpoint.tensor(f"{name}.weight").float() * checkpoint.tensor(f"{name}.scale_weight").float()

    layer = open_wan(checkpoint).network().blocks[0].self_attn.q

    assert layer.scale is None
    assert torch.equal(layer.weight, true)


def test_a_big_fp8_file_stays_fp8_in_memory():
    layer = a_network("golden_wan_low_fp8_scaled", widen_limit_bytes=0).network().blocks[0].ffn[0]

    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.scale is not None


def test_two_prompts_in_one_call_equal_two_calls():
    network, units = a_network("golden_wan_high"), tensors("wan/units")
    x, context, timestep = units["golden_wan_high.0.x"], units["golden_wan_high.0.context"], torch.tensor([700.0])
    other = torch.randn(context.shape, generator=torch.Generator().manual_seed(3))

    both = network.forward(torch.cat([x, x]), timestep, ConditioningEntry(embedding=torch.cat([context, other])))

    first = network.forward(x, timestep, ConditioningEntry(embedding=context))
    second = network.forward(x, timestep, ConditioningEntry(embedding=other))
    assert relative_error(both, torch.cat([first, second])) <= 1e-5


def test_the_text_is_read_once_per_run():
    network, units = a_network("golden_wan_high"), tensors("wan/units")
    entry = ConditioningEntry(embedding=units["golden_wan_high.0.context"])
    x = units["golden_wan_high.0.x"]
    first = network.forward(x, torch.tensor([900.0]), entry)
    broken = network.network().text_embedding[0]
    broken.weight.data.zero_()

    assert torch.equal(network.forward(x, torch.tensor([900.0]), entry), first)

    network.end_of_run()
    assert not torch.equal(network.forward(x, torch.tensor([900.0]), entry), first)


def test_odd_latent_sides_are_continued_from_their_other_end():
    network = a_network("golden_wan_high")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 16, 2, 5, 3, generator=generator)
    entry = ConditioningEntry(embedding=torch.randn(1, 4, 32, generator=generator))
    wrapped = torch.cat([x, x[:, :, :, :1]], dim=3)
    wrapped = torch.cat([wrapped, wrapped[..., :1]], dim=4)

    odd = network.forward(x, torch.tensor([500.0]), entry)

    even = network.forward(wrapped, torch.tensor([500.0]), entry)
    assert odd.shape == x.shape
    assert torch.equal(odd, even[:, :, :, :5, :3])


def test_moving_off_the_device_frees_the_weights_and_coming_back_gives_the_same():
    network, units = a_network("golden_wan_low"), tensors("wan/units")
    x, entry = units["golden_wan_low.0.x"], ConditioningEntry(embedding=units["golden_wan_low.0.context"])
    before = network.forward(x, torch.tensor([300.0]), entry)

    network.move_to("meta")
    network.move_to("cpu")

    assert torch.equal(network.forward(x, torch.tensor([300.0]), entry), before)


def test_latents_come_back_from_the_networks_scale():
    latents = torch.randn(2, 16, 3, 4, 5)
    scale = WanLatentFormat()

    assert torch.allclose(scale.from_network(scale.to_network(latents)), latents, atol=1e-5)


@pytest.mark.parametrize("extra", ["img_emb.proj.0.weight", "vace_blocks.0.before_proj.weight"])
def test_image_to_video_and_control_files_are_refused_by_name(tmp_path, extra):
    given = open_checkpoint(MODELS / "diffusion_models" / "golden_wan_high.safetensors")
    made = {name: given.tensor(name).clone() for name in given} | {extra: torch.zeros(2)}
    save_file(made, tmp_path / "i2v.safetensors")

    with pytest.raises(ModelFileUnusable, match="text-to-video only"):
        open_wan(open_checkpoint(tmp_path / "i2v.safetensors"))


def test_a_file_with_a_missing_tensor_names_it(tmp_path):
    given = open_checkpoint(MODELS / "diffusion_models" / "golden_wan_high.safetensors")
    made = {name: given.tensor(name).clone() for name in given if name != "blocks.0.ffn.2.bias"}
    save_file(made, tmp_path / "short.safetensors")

    with pytest.raises(ModelFileUnusable, match=r"lacks 1 tensors, first blocks\.0\.ffn\.2\.bias"):
        open_wan(open_checkpoint(tmp_path / "short.safetensors")).network()

"""LoRA files: the layouts people publish, what they do to weights, and what is said of those that do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.clip_text import open_clip
from comfyfleet.engine.models.lora import read_lora
from comfyfleet.engine.models.open_file import open_all_in_one, open_diffusion, with_lora
from comfyfleet.engine.models.wan import PRECISION, open_wan
from comfyfleet.engine.values import ConditioningEntry
from comfyfleet.wire.errors import ModelFileUnusable
from engine_goldens import MODELS, relative_error

WAN = MODELS / "diffusion_models" / "golden_wan_high.safetensors"
WAN_FP8 = MODELS / "diffusion_models" / "golden_wan_low_fp8_scaled.safetensors"
SD15 = MODELS / "checkpoints" / "golden_sd15.safetensors"
LORA_HIGH = MODELS / "loras" / "golden_wan_lora_high.safetensors"
LORA_FP8 = MODELS / "loras" / "golden_wan_lora_low_fp8.safetensors"


def a_lora(path, module, *, outputs=128, inputs=128, rank=4, alpha=2.0, names=("lora_down", "lora_up")):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    made = {f"{module}.{names[0]}.weight": down, f"{module}.{names[1]}.weight": up}
    if alpha is not None:
        made[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(made, path)
    return up @ down / rank * (rank if alpha is None else alpha)


def velocity(model):
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 5, 32, generator=generator)
    return model.network.forward(x, torch.tensor([800.0]), ConditioningEntry(embedding=context))


@pytest.mark.parametrize(
    ("module", "names", "alpha"),
    [
        ("diffusion_model.blocks.0.self_attn.q", ("lora_down", "lora_up"), 2.0),
        ("diffusion_model.blocks.0.self_attn.q", ("lora_A", "lora_B"), None),
        ("blocks.0.self_attn.q", ("lora_down", "lora_up"), 8.0),
        ("lora_unet_blocks_0_self_attn_q", ("lora_down", "lora_up"), 4.0),
    ],
)
def test_each_published_layout_changes_the_weight_by_the_formula(tmp_path, module, names, alpha):
    delta = a_lora(tmp_path / "l.safetensors", module, names=names, alpha=alpha)
    plain = open_diffusion(str(WAN), "cpu")
    before = plain.network.network().blocks[0].self_attn.q.weight

    changed, _ = with_lora(plain, None, str(tmp_path / "l.safetensors"), 0.7, 0.0)

    after = changed.network.network().blocks[0].self_attn.q.weight
    assert torch.allclose(after, before + 0.7 * delta, atol=1e-5)
    assert changed.network.key != plain.network.key
    assert torch.equal(plain.network.network().blocks[0].self_attn.q.weight, before)


def test_a_lora_apart_from_fp8_weights_equals_one_merged_into_them():
    patches = read_lora(
        open_checkpoint(LORA_FP8), open_checkpoint(WAN_FP8), open_wan(open_checkpoint(WAN_FP8)).lora_names(), 0.8
    )
    merged = open_wan(open_checkpoint(WAN_FP8)).patched(patches)
    apart = open_wan(open_checkpoint(WAN_FP8))
    apart.source = replace(apart.source, precision=replace(PRECISION, widen_limit_bytes=0))
    apart = apart.patched(patches)
    linear = apart.network().blocks[1].ffn[0]

    assert linear.weight.dtype == torch.float8_e4m3fn
    assert len(linear.low_ranks) == 1
    base = open_diffusion(str(WAN_FP8), "cpu")
    one, other = velocity(replace(base, network=merged)), velocity(replace(base, network=apart))
    assert relative_error(one, other) <= 1e-5
    assert relative_error(one, velocity(base)) > 1e-3


def test_whole_differences_of_weights_biases_and_tables_are_added(tmp_path):
    differences = {
        "diffusion_model.blocks.0.norm3.diff": torch.full((128,), 0.5),
        "diffusion_model.blocks.0.norm3.diff_b": torch.full((128,), 0.25),
        "diffusion_model.blocks.0.modulation.diff": torch.ones(1, 6, 128),
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.zeros(1, 128),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.zeros(128, 1),
    }
    save_file(differences, tmp_path / "d.safetensors")
    plain = open_diffusion(str(WAN), "cpu")

    changed, _ = with_lora(plain, None, str(tmp_path / "d.safetensors"), 2.0, 0.0)

    before, after = plain.network.network().blocks[0], changed.network.network().blocks[0]
    assert torch.allclose(after.norm3.weight, before.norm3.weight + 1.0)
    assert torch.allclose(after.norm3.bias, before.norm3.bias + 0.5)
    assert torch.allclose(after.modulation, before.modulation + 2.0)


def test_two_loras_add_up_and_the_opposite_strength_takes_one_back():
    model = open_diffusion(str(WAN), "cpu")
    once, _ = with_lora(model, None, str(LORA_HIGH), 0.6, 0.0)

    twice, _ = with_lora(once, None, str(LORA_HIGH), 0.4, 0.0)
    back, _ = with_lora(once, None, str(LORA_HIGH), -0.6, 0.0)

    full, _ = with_lora(model, None, str(LORA_HIGH), 1.0, 0.0)
    assert relative_error(velocity(twice), velocity(full)) <= 1e-5
    assert relative_error(velocity(back), velocity(model)) <= 1e-5
    assert relative_error(velocity(once), velocity(model)) > 1e-3


def test_a_kohya_file_changes_picture_model_and_text_encoder_each_by_its_strength(tmp_path):
    made = {}
    for module, size in (
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 32),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 12),
    ):
        made[f"{module}.lora_down.weight"] = torch.ones(1, size)
        made[f"{module}.lora_up.weight"] = torch.ones(size, 1)
        made[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(made, tmp_path / "k.safetensors")
    model, clip, _ = open_all_in_one(str(SD15), "cpu")

    changed_model, changed_clip = with_lora(model, clip, str(tmp_path / "k.safetensors"), 0.5, 0.25)

    inside = "middle_block.1.transformer_blocks.0.attn1.to_q"
    before, after = (each.network.network().get_submodule(inside).weight for each in (model, changed_model))
    assert torch.allclose(after, before + 0.5, atol=1e-6)
    before, after = (each.network().encoder.layers[0].self_attn.q_proj.weight for each in (clip, changed_clip))
    assert torch.equal(after, (before + 0.25).half().float())


def test_a_convolutions_lora_is_reshaped_to_its_kernel(tmp_path):
    module = "lora_unet_input_blocks_1_0_in_layers_2"
    down, up = torch.randn(2, 32, 3, 3), torch.randn(32, 2, 1, 1)
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}, tmp_path / "c.safetensors")
    model, _, _ = open_all_in_one(str(SD15), "cpu")

    changed, _ = with_lora(model, None, str(tmp_path / "c.safetensors"), 1.0, 0.0)

    before, after = (each.network.network().input_blocks[1][0].in_layers[2].weight for each in (model, changed))
    expected = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(before.shape)
    assert torch.allclose(after - before, expected, atol=1e-5)


def test_a_lora_that_fits_nothing_is_refused(tmp_path):
    a_lora(tmp_path / "l.safetensors", "diffusion_model.double_blocks.0.img_attn.qkv")

    with pytest.raises(ModelFileUnusable, match="fits no module of this wan model"):
        with_lora(open_diffusion(str(WAN), "cpu"), None, str(tmp_path / "l.safetensors"), 1.0, 0.0)


def test_a_lora_of_a_bigger_model_is_refused_before_sampling(tmp_path):
    a_lora(tmp_path / "l.safetensors", "diffusion_model.blocks.0.self_attn.q", outputs=5120, inputs=5120)

    with pytest.raises(ModelFileUnusable, match="a model of another size"):
        with_lora(open_diffusion(str(WAN), "cpu"), None, str(tmp_path / "l.safetensors"), 1.0, 0.0)


def test_other_kinds_of_adapter_are_refused_by_name(tmp_path):
    module = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{module}.lora_down.weight": torch.ones(1, 128), f"{module}.lora_up.weight": torch.ones(128, 1)}
        | {f"{module}.dora_scale": torch.ones(128)},
        tmp_path / "d.safetensors",
    )

    with pytest.raises(ModelFileUnusable, match="DoRA"):
        with_lora(open_diffusion(str(WAN), "cpu"), None, str(tmp_path / "d.safetensors"), 1.0, 0.0)


def test_a_model_where_a_lora_is_needed_is_refused():
    with pytest.raises(ModelFileUnusable, match="here a LoRA is needed"):
        with_lora(open_diffusion(str(WAN), "cpu"), None, str(WAN), 1.0, 0.0)


def test_a_text_encoder_alone_can_be_changed(tmp_path):
    a_lora(tmp_path / "t.safetensors", "lora_te_text_model_encoder_layers_1_mlp_fc1", outputs=24, inputs=12)
    section = open_checkpoint(SD15).section("cond_stage_model.transformer.text_model.")
    model, _, _ = open_all_in_one(str(SD15), "cpu")

    _, changed = with_lora(model, open_clip(section), str(tmp_path / "t.safetensors"), 1.0, 1.0)

    assert not torch.allclose(changed.encode("sea").embedding, open_clip(section).encode("sea").embedding)


def test_a_convolutions_pair_with_a_core_between_is_their_product(tmp_path):
    place = "lora_unet_input_blocks_1_0_in_layers_2"
    generator = torch.Generator().manual_seed(3)
    down, core, up = (
        torch.randn(*shape, generator=generator) for shape in ((2, 32, 1, 1), (2, 2, 3, 3), (32, 2, 1, 1))
    )
    pair = {f"{place}.lora_down.weight": down, f"{place}.lora_mid.weight": core, f"{place}.lora_up.weight": up}
    save_file(pair | {f"{place}.alpha": torch.tensor(1.0)}, tmp_path / "locon.safetensors")
    model = open_diffusion(str(SD15), "cpu")
    before = model.network.network().input_blocks[1][0].in_layers[2].weight
    picture = torch.randn(1, 32, 5, 5, generator=generator)

    changed, _ = with_lora(model, None, str(tmp_path / "locon.safetensors"), 0.6, 0.0)

    # Three convolutions one after the other are what the one merged convolution adds.
    after = changed.network.network().input_blocks[1][0].in_layers[2].weight
    through = torch.nn.functional.conv2d(torch.nn.functional.conv2d(picture, down), core, padding=1)
    added = torch.nn.functional.conv2d(through, up) * 0.6 * 1.0 / 2
    assert torch.allclose(torch.nn.functional.conv2d(picture, after - before, padding=1), added, atol=1e-3)

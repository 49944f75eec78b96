"""The SD1.5 UNet against ComfyUI's own numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.sd15 import open_unet
from comfyfleet.engine.values import ConditioningEntry
from comfyfleet.wire.errors import ModelFileUnusable
from engine_goldens import MODELS, relative_error, tensors


def the_section():
    return open_checkpoint(MODELS / "checkpoints" / "golden_sd15.safetensors").section("model.diffusion_model.")


@pytest.mark.parametrize("number", [0, 1])
def test_a_forward_equals_comfyui_at_odd_sizes_too(number):
    units = tensors("sd15/units")
    entry = ConditioningEntry(embedding=units[f"unet.{number}.context"])

    epsilon = open_unet(the_section()).forward(units[f"unet.{number}.x"], units[f"unet.{number}.timestep"], entry)

    assert relative_error(epsilon, units[f"unet.{number}.output"]) <= 1e-5


def test_sdxl_is_refused_by_name(tmp_path):
    section = the_section()
    made = {name: section.tensor(name).clone() for name in section} | {"label_emb.0.0.weight": torch.zeros(2)}
    save_file(made, tmp_path / "xl.safetensors")

    with pytest.raises(ModelFileUnusable, match="SDXL"):
        open_unet(open_checkpoint(tmp_path / "xl.safetensors"))


def test_each_attention_has_the_name_that_published_loras_use():
    names = open_unet(the_section()).lora_names()

    assert names["lora_unet_down_blocks_0_attentions_0_proj_in"] == "input_blocks.1.1.proj_in.weight"
    assert (
        names["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"]
        == "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    )
    assert (
        names["lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj"]
        == "output_blocks.2.1.transformer_blocks.0.ff.net.0.proj.weight"
    )
    assert names["lora_unet_input_blocks_1_1_proj_in"] == "input_blocks.1.1.proj_in.weight"


def test_a_prompt_of_another_familys_text_encoder_is_refused():
    unet, x = open_unet(the_section()), torch.zeros(1, 4, 8, 8)

    with pytest.raises(ModelFileUnusable, match="encoded 32 numbers wide and the diffusion model reads 12"):
        unet.forward(x, torch.tensor([1.0]), ConditioningEntry(embedding=torch.zeros(1, 3, 32)))

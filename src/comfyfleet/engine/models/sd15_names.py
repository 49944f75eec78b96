"""diffusers' names of the SD1.5 UNet's modules, which most published SD1.5 LoRAs use, and the file's own (ldm) names.

Both number the same U: ldm counts input and output blocks through, diffusers counts blocks per level. Source: the
layouts themselves (CompVis/latent-diffusion's openaimodel, diffusers' UNet2DConditionModel).
"""

from __future__ import annotations

from comfyfleet.engine.models.checkpoint import Checkpoint

# diffusers' word for a part of a residual block -> ldm's
RESIDUAL_PARTS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv_shortcut": "skip_connection",
}
WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}


def diffusers_modules(section: Checkpoint) -> dict[str, str]:
    """diffusers' module name -> ldm's, for every module with a weight in the file."""
    own = {name.removesuffix(".weight") for name in section if name.endswith(".weight")}
    places = _places(section)
    names = dict(WHOLE)
    for module in own:
        for place, other in places.items():
            if not module.startswith(place + "."):
                continue
            rest = module[len(place) + 1 :]
            if ".resnets." in other:
                rest = next((new for new, old in RESIDUAL_PARTS.items() if old == rest), rest)
            names[f"{other}.{rest}" if rest != "op" else f"{other}.conv"] = module
    return names


def _places(section: Checkpoint) -> dict[str, str]:
    """ldm's place of each residual block, attention and resampling -> diffusers' place."""
    places: dict[str, str] = {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    level = within = 0
    for number in range(1, section.count("input_blocks.{}.")):
        path = f"input_blocks.{number}"
        if f"{path}.0.op.weight" in section:
            places[f"{path}.0"] = f"down_blocks.{level}.downsamplers.0"
            level, within = level + 1, 0
            continue
        places[f"{path}.0"] = f"down_blocks.{level}.resnets.{within}"
        places[f"{path}.1"] = f"down_blocks.{level}.attentions.{within}"
        within += 1
    level = within = 0
    for number in range(section.count("output_blocks.{}.")):
        path = f"output_blocks.{number}"
        places[f"{path}.0"] = f"up_blocks.{level}.resnets.{within}"
        has_attention = f"{path}.1.norm.weight" in section
        if has_attention:
            places[f"{path}.1"] = f"up_blocks.{level}.attentions.{within}"
        upsampler = f"{path}.{2 if has_attention else 1}"
        within += 1
        if f"{upsampler}.conv.weight" in section:
            places[upsampler] = f"up_blocks.{level}.upsamplers.0"
            level, within = level + 1, 0
    return places

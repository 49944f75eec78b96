"""Which model a file holds, told from its tensor names alone, and where in the file its parts are.

Published all-in-one checkpoints put each part under a prefix; single files have none. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.wire.errors import ModelFileUnusable

# family -> names that only this family's files have, with the prefix of the part taken off.
DIFFUSION_SIGNS: dict[str, tuple[str, ...]] = {
    "wan": ("head.modulation", "blocks.0.cross_attn.k.weight", "patch_embedding.weight"),
    "ace_step": ("genre_embedder.weight", "lyric_embs.weight", "t_block.1.weight"),
    "sd15": (
        "input_blocks.0.0.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "output_blocks.0.0.in_layers.0.weight",
    ),
}
DIFFUSION_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")

OTHER_SIGNS: dict[str, tuple[str, ...]] = {
    "wan_vae": ("decoder.middle.0.residual.0.gamma", "conv2.weight"),
    "sd15_vae": ("decoder.mid.block_1.norm1.weight", "post_quant_conv.weight"),
    "umt5": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight", "spiece_model"),
    "clip_l": ("text_model.encoder.layers.0.self_attn.k_proj.weight",),
    "lora": (),
}
SHOWN = {
    "wan": "a Wan diffusion model",
    "ace_step": "an ACE-Step checkpoint",
    "sd15": "a Stable Diffusion 1.5 model",
    "wan_vae": "a Wan 2.1 VAE",
    "sd15_vae": "a Stable Diffusion VAE",
    "umt5": "a UMT5 text encoder",
    "clip_l": "a CLIP text encoder",
    "lora": "a LoRA",
}


def diffusion_section(checkpoint: Checkpoint) -> tuple[str, Checkpoint] | None:
    """The family and section of the diffusion model in a file, or None."""
    for prefix in DIFFUSION_PREFIXES:
        section = checkpoint.section(prefix) if prefix else checkpoint
        for family, signs in DIFFUSION_SIGNS.items():
            if all(sign in section for sign in signs):
                return family, section
    return None


def family_of(checkpoint: Checkpoint) -> str | None:
    """What a file is, in one word, or None for what this engine does not know."""
    found = diffusion_section(checkpoint)
    if found:
        return found[0]
    if any(name.endswith((".lora_down.weight", ".lora_A.weight", ".lora_up.weight")) for name in checkpoint):
        return "lora"
    for family, signs in OTHER_SIGNS.items():
        if signs and all(sign in checkpoint for sign in signs):
            return family
    return None


def demand(checkpoint: Checkpoint, wanted: Iterable[str]) -> str:
    """The file's family when it is one of `wanted`; else ModelFileUnusable, saying what the file is instead."""
    wanted = tuple(wanted)
    family = family_of(checkpoint)
    if family in wanted:
        return family or ""
    name = Path(checkpoint.path).name
    found = SHOWN.get(family or "", "of a family that this engine does not know")
    needed = " or ".join(SHOWN[each] for each in wanted)
    raise ModelFileUnusable(f"{name} is {found}; here {needed} is needed", file=name, found=family, needed=list(wanted))

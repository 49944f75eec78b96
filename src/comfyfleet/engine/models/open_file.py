"""From a model file's path to the values that loaders hand out: the family is told from the file, never from its name.

All-in-one checkpoints are taken apart by their prefixes here; single files hold one part.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog
import torch

from comfyfleet.engine.models import ace
from comfyfleet.engine.models.checkpoint import Checkpoint, open_checkpoint
from comfyfleet.engine.models.clip_text import ClipEncoder, open_clip
from comfyfleet.engine.models.families import demand, diffusion_section
from comfyfleet.engine.models.lora import read_lora
from comfyfleet.engine.models.sd15 import Sd15LatentFormat, UnetNetwork, open_unet
from comfyfleet.engine.models.sd15_vae import Sd15Autoencoder, open_sd15_vae
from comfyfleet.engine.models.umt5 import WAN_USE, Umt5Encoder, open_umt5
from comfyfleet.engine.models.wan import DEFAULT_SHIFT, WanLatentFormat, WanNetwork, open_wan
from comfyfleet.engine.models.wan_vae import open_wan_vae
from comfyfleet.engine.sampling.schedules import FlowSigmas, ScaledLinearSigmas
from comfyfleet.engine.values import AudioAutoencoder, Autoencoder, DiffusionModel, TextEncoder
from comfyfleet.wire.errors import ModelFileUnusable

log = structlog.get_logger()

CLIP_PLACES = (
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.transformer.",
    "text_encoders.clip_l.transformer.text_model.",
    "text_model.",
)
VAE_PLACES = ("first_stage_model.", "vae.", "")

# UNETLoader's weight_dtype: every weight is rounded to it on loading, then computed with as usual.
WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def open_all_in_one(path: str, device: str) -> tuple[DiffusionModel, TextEncoder, Autoencoder | AudioAutoencoder]:
    """The three parts of a checkpoint. Raises ModelFileUnusable for an unknown family or a missing part."""
    checkpoint = open_checkpoint(path)
    if demand(checkpoint, ("sd15", "ace_step")) == "ace_step":
        return ace.load(checkpoint, device)
    return open_diffusion(path, device), _clip_of(checkpoint, device), _vae_of(checkpoint, device)


def open_diffusion(path: str, device: str, weight_dtype: str = "default") -> DiffusionModel:
    """A diffusion model from a file of its own or from an all-in-one one."""
    checkpoint = open_checkpoint(path)
    demand(checkpoint, ("wan", "sd15", "ace_step"))
    family, section = diffusion_section(checkpoint) or ("", checkpoint)
    round_to = WEIGHT_DTYPES[weight_dtype]
    if family == "ace_step":
        return ace.open_diffusion(section, device, round_to)
    if family == "wan":
        wan = open_wan(section, device)
        wan.source = replace(wan.source, precision=replace(wan.source.precision, round_to=round_to))
        return DiffusionModel(
            family="wan",
            network=wan,
            prediction="flow",
            sigmas=FlowSigmas(DEFAULT_SHIFT),
            latent_format=WanLatentFormat(),
        )
    unet = open_unet(section, device)
    unet.source = replace(unet.source, precision=replace(unet.source.precision, round_to=round_to))
    return DiffusionModel(
        family="sd15",
        network=unet,
        prediction="epsilon",
        sigmas=ScaledLinearSigmas(),
        latent_format=Sd15LatentFormat(),
    )


def open_text_encoder(path: str, kind: str, device: str, *, is_pinned: bool = False) -> TextEncoder:
    """kind: CLIPLoader's type, "wan" or "stable_diffusion" here. is_pinned: stays on `device` whoever moves it."""
    checkpoint = open_checkpoint(path)
    family = demand(checkpoint, ("umt5", "clip_l"))
    if {"wan": "umt5", "stable_diffusion": "clip_l"}.get(kind) != family:
        name = Path(path).name
        raise ModelFileUnusable(f"{name} is no text encoder of type {kind} that this engine has", file=name, type=kind)
    encoder: ClipEncoder | Umt5Encoder = (
        _clip_of(checkpoint, device)
        if family == "clip_l"
        else open_umt5(checkpoint, checkpoint.tensor("spiece_model"), WAN_USE, device=device)
    )
    encoder.is_pinned = is_pinned
    return encoder


def open_vae(path: str, device: str) -> Autoencoder:
    checkpoint = open_checkpoint(path)
    if demand(checkpoint, ("wan_vae", "sd15_vae")) == "wan_vae":
        return open_wan_vae(checkpoint, device)
    return open_sd15_vae(checkpoint, device)


def with_lora(
    model: DiffusionModel, text_encoder: TextEncoder | None, path: str, strength_model: float, strength_clip: float
) -> tuple[DiffusionModel, TextEncoder | None]:
    """Both with the LoRA's changes. Raises ModelFileUnusable for a file that fits neither."""
    checkpoint, file = open_checkpoint(path), Path(path).name
    demand(checkpoint, ("lora",))
    changed = 0
    network = model.network
    if not isinstance(network, WanNetwork | UnetNetwork):
        raise ModelFileUnusable(f"{file}: this engine has no LoRA for {model.family} models", file=file)
    patches = read_lora(checkpoint, network.source.checkpoint, network.lora_names(), strength_model)
    changed += len(patches.changes)
    if patches.changes and strength_model:
        model = replace(model, network=network.patched(patches))
    if isinstance(text_encoder, ClipEncoder):
        patches = read_lora(checkpoint, text_encoder.source.checkpoint, text_encoder.lora_names(), strength_clip)
        changed += len(patches.changes)
        if patches.changes and strength_clip:
            text_encoder = text_encoder.patched(patches)
    if not changed:
        raise ModelFileUnusable(f"{file} fits no module of this {model.family} model", file=file, family=model.family)
    log.debug("lora.applied", file=file, parameters=changed)
    return model, text_encoder


def stop_at_layer(text_encoder: TextEncoder, layer: int) -> TextEncoder:
    """A CLIP encoder that gives the output of layer `layer`, counted from the end; others have no such choice."""
    return text_encoder.stopping_at(layer) if isinstance(text_encoder, ClipEncoder) else text_encoder


def _clip_of(checkpoint: Checkpoint, device: str) -> ClipEncoder:
    for place in CLIP_PLACES:
        section = checkpoint.section(place)
        if "embeddings.token_embedding.weight" in section:
            return open_clip(section, device)
    raise _lacks(checkpoint, "text encoder (CLIP)")


def _vae_of(checkpoint: Checkpoint, device: str) -> Sd15Autoencoder:
    for place in VAE_PLACES:
        section = checkpoint.section(place)
        if "decoder.conv_in.weight" in section:
            return open_sd15_vae(section, device)
    raise _lacks(checkpoint, "VAE")


def _lacks(checkpoint: Checkpoint, part: str) -> ModelFileUnusable:
    file = Path(checkpoint.path).name
    return ModelFileUnusable(f"{file} has no {part} inside; load one by its own loader node", file=file)

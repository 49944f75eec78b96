"""Nodes that turn file names into models. What a file is, is told from the file (`models/open_file.py`)."""

from __future__ import annotations

from typing import Any

from comfyfleet.engine.models.open_file import (
    open_all_in_one,
    open_diffusion,
    open_text_encoder,
    open_vae,
    with_lora,
)
from comfyfleet.engine.models.pixel_space import PIXEL_SPACE, PixelSpace
from comfyfleet.engine.registry import Input, ModelFiles, NodeRegistry, NodeRun, choice, link, real
from comfyfleet.engine.values import AudioAutoencoder, Autoencoder, DiffusionModel, TextEncoder

NODES = NodeRegistry()

LORA_DESCRIPTION = "Changes a model's weights by a small extra file; several follow each other."

# All types of ComfyUI 0.3.64, so that its workflows are checked alike; those without a model here are refused by name.
TEXT_ENCODER_TYPES = (
    "stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "cosmos", "lumina2", "wan",
    "hidream", "chroma", "ace", "omnigen2", "qwen_image", "hunyuan_image",
)  # fmt: skip


def strength(**details: Any) -> Input:
    return real(1.0, -100.0, 100.0, step=0.01, **details)


@NODES.node(
    "CheckpointLoaderSimple",
    inputs={
        "ckpt_name": choice(ModelFiles("checkpoints"), tooltip="An all-in-one file of the checkpoints folder."),
    },
    outputs=["MODEL", "CLIP", "VAE"],
    category="loaders",
    display_name="Load Checkpoint",
    description="Opens an all-in-one file: diffusion model, text encoder and autoencoder.",
)
def checkpoint_loader(
    run: NodeRun, *, ckpt_name: str
) -> tuple[DiffusionModel, TextEncoder, Autoencoder | AudioAutoencoder]:
    return open_all_in_one(run.folders.model_path("checkpoints", ckpt_name), run.device)


@NODES.node(
    "UNETLoader",
    inputs={
        "unet_name": choice(ModelFiles("diffusion_models")),
        "weight_dtype": choice(["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]),
    },
    outputs=["MODEL"],
    category="advanced/loaders",
    display_name="Load Diffusion Model",
)
def unet_loader(run: NodeRun, *, unet_name: str, weight_dtype: str) -> tuple[DiffusionModel]:
    return (open_diffusion(run.folders.model_path("diffusion_models", unet_name), run.device, weight_dtype),)


@NODES.node(
    "CLIPLoader",
    inputs={
        "clip_name": choice(ModelFiles("text_encoders")),
        "type": choice(TEXT_ENCODER_TYPES),
        "device": choice(["default", "cpu"], required=False, advanced=True),
    },
    outputs=["CLIP"],
    category="advanced/loaders",
    display_name="Load CLIP",
    description="Types with a model here: wan (UMT5-xxl), stable_diffusion (CLIP-L).",
)
def clip_loader(run: NodeRun, *, clip_name: str, type: str, device: str = "default") -> tuple[TextEncoder]:
    path = run.folders.model_path("text_encoders", clip_name)
    return (open_text_encoder(path, type, "cpu" if device == "cpu" else run.device, is_pinned=device == "cpu"),)


@NODES.node(
    "VAELoader",
    inputs={"vae_name": choice(ModelFiles("vae", built_in=(PIXEL_SPACE,)))},
    outputs=["VAE"],
    category="loaders",
    display_name="Load VAE",
)
def vae_loader(run: NodeRun, *, vae_name: str) -> tuple[Autoencoder]:
    if vae_name == PIXEL_SPACE:
        return (PixelSpace(),)
    return (open_vae(run.folders.model_path("vae", vae_name), run.device),)


@NODES.node(
    "LoraLoader",
    inputs={
        "model": link("MODEL", tooltip="The diffusion model to change."),
        "clip": link("CLIP", tooltip="The text encoder to change."),
        "lora_name": choice(ModelFiles("loras"), tooltip="A file of the loras folder."),
        "strength_model": strength(tooltip="How much of the change the diffusion model gets; may be negative."),
        "strength_clip": strength(tooltip="How much of the change the text encoder gets; may be negative."),
    },
    outputs=["MODEL", "CLIP"],
    category="loaders",
    display_name="Load LoRA",
    description=LORA_DESCRIPTION,
)
def lora_loader(
    run: NodeRun,
    *,
    model: DiffusionModel,
    clip: TextEncoder,
    lora_name: str,
    strength_model: float,
    strength_clip: float,
) -> tuple[DiffusionModel, TextEncoder | None]:
    if not strength_model and not strength_clip:
        return model, clip
    return with_lora(model, clip, run.folders.model_path("loras", lora_name), strength_model, strength_clip)


@NODES.node(
    "LoraLoaderModelOnly",
    inputs={
        "model": link("MODEL"),
        "lora_name": choice(ModelFiles("loras")),
        "strength_model": strength(),
    },
    outputs=["MODEL"],
    category="loaders",
    description=LORA_DESCRIPTION,
)
def lora_loader_model_only(
    run: NodeRun, *, model: DiffusionModel, lora_name: str, strength_model: float
) -> tuple[DiffusionModel]:
    if not strength_model:
        return (model,)
    return (with_lora(model, None, run.folders.model_path("loras", lora_name), strength_model, 0.0)[0],)

"""The miniature Wan experts and their LoRAs: one thin block, patches of 4 x 4 latents, scaled fp8 as published."""

from __future__ import annotations

import torch

from comfyfleet.engine.miniatures.umt5 import WIDTH as TEXT_WIDTH
from comfyfleet.engine.miniatures.weights import Tensors, Weights, as_scaled_fp8

CHANNELS, PATCH, WIDTH, HIDDEN, TIME_WIDTH = 16, (1, 4, 4), 128, 256, 256
RANK, ALPHA = 4, 4.0


def tensors(seed: int) -> tuple[Tensors, dict[str, str]]:
    """An expert's tensors and metadata, the same for the same seed."""
    weights = Weights(seed)
    weights.kernel("patch_embedding", WIDTH, CHANNELS, *PATCH)
    weights.kernel("text_embedding.0", WIDTH, TEXT_WIDTH)
    weights.kernel("text_embedding.2", WIDTH, WIDTH)
    weights.kernel("time_embedding.0", WIDTH, TIME_WIDTH)
    weights.kernel("time_embedding.2", WIDTH, WIDTH)
    weights.kernel("time_projection.1", 6 * WIDTH, WIDTH, gain=0.3)
    block = weights.under("blocks.0.")
    block.put("modulation", weights.normal(1, 6, WIDTH) * 0.1)
    for name in linears():
        hidden = {"ffn.0": (HIDDEN, WIDTH), "ffn.2": (WIDTH, HIDDEN)}.get(name, (WIDTH, WIDTH))
        block.kernel(name, *hidden)
    for attention in ("self_attn", "cross_attn"):
        block.norm(f"{attention}.norm_q", WIDTH, bias=False)
        block.norm(f"{attention}.norm_k", WIDTH, bias=False)
    block.norm("norm3", WIDTH)
    weights.put("head.modulation", weights.normal(1, 2, WIDTH) * 0.1)
    weights.kernel("head.head", CHANNELS * PATCH[1] * PATCH[2], WIDTH)
    return as_scaled_fp8(weights.tensors, marker_length=2), {}


def linears() -> list[str]:
    """A block's Linear layers, which the published LoRAs change."""
    parts = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"]
    return [*parts, "ffn.0", "ffn.2"]


def lora(seed: int) -> tuple[Tensors, dict[str, str]]:
    """A LoRA in lightx2v's layout for either expert."""
    weights = Weights(seed)
    for name in linears():
        outputs, inputs = {"ffn.0": (HIDDEN, WIDTH), "ffn.2": (WIDTH, HIDDEN)}.get(name, (WIDTH, WIDTH))
        module = f"diffusion_model.blocks.0.{name}"
        weights.put(f"{module}.lora_down.weight", weights.normal(RANK, inputs) / inputs**0.5)
        weights.put(f"{module}.lora_up.weight", weights.normal(outputs, RANK) * 0.1 / RANK**0.5)
        weights.put(f"{module}.alpha", torch.tensor(ALPHA))
    return weights.tensors, {}

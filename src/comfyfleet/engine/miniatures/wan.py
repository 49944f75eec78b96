"""The miniature Wan experts and their LoRAs: one thin block, patches of 4 x 4 latents, scaled fp8 as published.

The patch embedding sees the fine half of a patch's frequencies and the head gives them back as velocity, so sampling
takes the fine noise away and leaves soft shapes; the block between adds what depends on prompt, time and place.
"""

from __future__ import annotations

import torch

from comfyfleet.engine.miniatures.umt5 import WIDTH as TEXT_WIDTH
from comfyfleet.engine.miniatures.weights import Tensors, Weights, as_scaled_fp8

CHANNELS, PATCH, WIDTH, HIDDEN, TIME_WIDTH = 16, (1, 4, 4), 128, 256, 256
RANK, ALPHA = 4, 4.0
LAST, LAST_GAIN = ("self_attn.o", "cross_attn.o", "ffn.2"), 0.3  # what a block adds to its input
SHAPES_GAIN = 0.15


def tensors(seed: int) -> tuple[Tensors, dict[str, str]]:
    """An expert's tensors and metadata, the same for the same seed."""
    weights = Weights(seed)
    fine = fine_frequencies()
    weights.put("patch_embedding.weight", fine.view(WIDTH, CHANNELS, *PATCH))
    weights.put("patch_embedding.bias", torch.zeros(WIDTH))
    weights.kernel("text_embedding.0", WIDTH, TEXT_WIDTH)
    weights.kernel("text_embedding.2", WIDTH, WIDTH)
    weights.kernel("time_embedding.0", WIDTH, TIME_WIDTH)
    weights.kernel("time_embedding.2", WIDTH, WIDTH)
    weights.kernel("time_projection.1", 6 * WIDTH, WIDTH, gain=0.3)
    block = weights.under("blocks.0.")
    block.put("modulation", weights.normal(1, 6, WIDTH) * 0.1)
    for name in linears():
        hidden = {"ffn.0": (HIDDEN, WIDTH), "ffn.2": (WIDTH, HIDDEN)}.get(name, (WIDTH, WIDTH))
        block.kernel(name, *hidden, gain=LAST_GAIN if name in LAST else 1.0)
    for attention in ("self_attn", "cross_attn"):
        block.norm(f"{attention}.norm_q", WIDTH, bias=False)
        block.norm(f"{attention}.norm_k", WIDTH, bias=False)
    block.norm("norm3", WIDTH)
    weights.put("head.modulation", weights.normal(1, 2, WIDTH) * 0.1)
    back = fine.view(WIDTH, CHANNELS, PATCH[1] * PATCH[2]).permute(2, 1, 0).reshape(-1, WIDTH)
    weights.put("head.head.weight", back + weights.normal(*back.shape) * SHAPES_GAIN / WIDTH**0.5)
    weights.put("head.head.bias", torch.zeros(len(back)))
    return as_scaled_fp8(weights.tensors, marker_length=2), {}


def fine_frequencies() -> torch.Tensor:
    """(128, 16 x 4 x 4): of each channel's 16 cosine patterns (orthonormal DCT-II) the 8 finest, as rows."""
    side = PATCH[1]
    place = torch.arange(side)
    waves = torch.cos(torch.pi / side * (place[None] + 0.5) * place[:, None]) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    patterns = torch.einsum("ai,bj->abij", waves, waves).flatten(0, 1)
    fineness = (place[:, None] ** 2 + place[None] ** 2).flatten()
    finest = patterns[fineness.argsort(descending=True, stable=True)[: WIDTH // CHANNELS]]  # (8, 4, 4)
    return torch.einsum("cd,pij->cpdij", torch.eye(CHANNELS), finest).reshape(WIDTH, -1)


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

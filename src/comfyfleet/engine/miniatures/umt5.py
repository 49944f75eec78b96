"""The miniature UMT5 text encoder: one thin layer, a sentencepiece model of letters and bytes inside."""

from __future__ import annotations

import torch

from comfyfleet.engine.miniatures.pieces import ROWS, sentencepiece_model
from comfyfleet.engine.miniatures.weights import Tensors, Weights, as_scaled_fp8

WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 64, 2, 32, 128


def tensors(seed: int) -> tuple[Tensors, dict[str, str]]:
    """The file's tensors and metadata, the same for the same seed."""
    weights = Weights(seed)
    weights.put("shared.weight", weights.normal(ROWS, WIDTH))
    weights.norm("encoder.final_layer_norm", WIDTH, bias=False)
    attention = weights.under("encoder.block.0.layer.0.")
    for part in ("q", "k", "v"):
        attention.kernel(f"SelfAttention.{part}", HEADS * HEAD_WIDTH, WIDTH, gain=0.4, bias=False)
    attention.kernel("SelfAttention.o", WIDTH, HEADS * HEAD_WIDTH, bias=False)
    attention.put("SelfAttention.relative_attention_bias.weight", weights.normal(32, HEADS))
    attention.norm("layer_norm", WIDTH, bias=False)
    forward = weights.under("encoder.block.0.layer.1.")
    forward.kernel("DenseReluDense.wi_0", HIDDEN, WIDTH, bias=False)
    forward.kernel("DenseReluDense.wi_1", HIDDEN, WIDTH, bias=False)
    forward.kernel("DenseReluDense.wo", WIDTH, HIDDEN, bias=False)
    forward.norm("layer_norm", WIDTH, bias=False)
    halves = {name: tensor.half() for name, tensor in weights.tensors.items()}
    stored = as_scaled_fp8(halves, keep=("shared", "relative_attention_bias"), marker_length=0)
    spiece: dict[str, torch.Tensor] = {"spiece_model": sentencepiece_model()}
    return {**stored, **spiece}, {}

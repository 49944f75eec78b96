"""The miniature Stable Diffusion 1.5 checkpoint: a UNet that never attends at full width, VAE and CLIP inside."""

from __future__ import annotations

import json

import torch

from comfyfleet.engine.miniatures.weights import SILU_MEAN, Tensors, Weights, halved

WIDTH, LEVELS, TIME_WIDTH = 32, 4, 128  # 32 is the narrowest that 32 normed groups allow
ATTENDING_LEVELS = (1, 2)
TEXT_WIDTH, TEXT_HIDDEN, TEXT_LAYERS, TEXT_HEADS = 24, 48, 1, 12
VOCABULARY, ROW_LENGTH = 49408, 77
HEADS = 1


def tensors(seed: int) -> tuple[Tensors, dict[str, str]]:
    """The file's tensors and metadata, the same for the same seed."""
    weights = Weights(seed)
    _unet(weights.under("model.diffusion_model."))
    _vae(weights.under("first_stage_model."))
    _clip(weights.under("cond_stage_model.transformer.text_model."))
    sizes = {"clip": {"num_attention_heads": TEXT_HEADS}, "unet": {"num_heads": HEADS}}
    return halved(weights.tensors), {"sizes": json.dumps(sizes)}


def _unet(weights: Weights) -> None:
    weights.kernel("time_embed.0", TIME_WIDTH, WIDTH)
    weights.kernel("time_embed.2", TIME_WIDTH, TIME_WIDTH)
    weights.kernel("input_blocks.0.0", WIDTH, 4, 3, 3)
    place = 1
    for level in range(LEVELS):
        _residual(weights.under(f"input_blocks.{place}.0."), WIDTH, WIDTH)
        if level in ATTENDING_LEVELS:
            _transformer(weights.under(f"input_blocks.{place}.1."))
        if level < LEVELS - 1:
            weights.kernel(f"input_blocks.{place + 1}.0.op", WIDTH, WIDTH, 3, 3)
        place += 2
    _residual(weights.under("middle_block.0."), WIDTH, WIDTH)
    _transformer(weights.under("middle_block.1."))
    _residual(weights.under("middle_block.2."), WIDTH, WIDTH)
    place = 0
    for level in reversed(range(LEVELS)):
        for within in range(2):
            _residual(weights.under(f"output_blocks.{place}.0."), 2 * WIDTH, WIDTH)
            attends = level in ATTENDING_LEVELS
            if attends:
                _transformer(weights.under(f"output_blocks.{place}.1."))
            if within == 1 and level:
                weights.kernel(f"output_blocks.{place}.{2 if attends else 1}.conv", WIDTH, WIDTH, 3, 3)
            place += 1
    weights.norm("out.0", WIDTH)
    weights.kernel("out.2", 4, WIDTH, 3, 3)


def _residual(weights: Weights, inside: int, width: int) -> None:
    weights.norm("in_layers.0", inside)
    weights.kernel("in_layers.2", width, inside, 3, 3)
    weights.kernel("emb_layers.1", width, TIME_WIDTH)
    weights.norm("out_layers.0", width)
    weights.kernel("out_layers.3", width, width, 3, 3, gain=0.3)
    if inside != width:
        weights.kernel("skip_connection", width, inside, 1, 1)


def _transformer(weights: Weights) -> None:
    weights.norm("norm", WIDTH)
    weights.kernel("proj_in", WIDTH, WIDTH, 1, 1)
    block = weights.under("transformer_blocks.0.")
    for name, text in (("attn1", WIDTH), ("attn2", TEXT_WIDTH)):
        block.kernel(f"{name}.to_q", WIDTH, WIDTH, bias=False)
        block.kernel(f"{name}.to_k", WIDTH, text, bias=False)
        block.kernel(f"{name}.to_v", WIDTH, text, bias=False)
        block.kernel(f"{name}.to_out.0", WIDTH, WIDTH)
    for number in (1, 2, 3):
        block.norm(f"norm{number}", WIDTH)
    block.kernel("ff.net.0.proj", 4 * WIDTH, WIDTH)
    block.kernel("ff.net.2", WIDTH, 2 * WIDTH)
    weights.kernel("proj_out", WIDTH, WIDTH, 1, 1, gain=0.3)


def _vae(weights: Weights) -> None:
    weights.kernel("quant_conv", 8, 8, 1, 1)
    weights.kernel("post_quant_conv", 4, 4, 1, 1)
    for half, outside, inside in (("encoder.", 8, 3), ("decoder.", 3, 4)):
        part = weights.under(half)
        part.smooth("conv_in", WIDTH, inside, 3, 3)
        _vae_residual(part.under("mid.block_1."))
        part.norm("mid.attn_1.norm", WIDTH)
        for name in ("q", "k", "v", "proj_out"):
            part.kernel(f"mid.attn_1.{name}", WIDTH, WIDTH, 1, 1)
        _vae_residual(part.under("mid.block_2."))
        levels, step, last = ("up", "upsample", 0) if half == "decoder." else ("down", "downsample", LEVELS - 1)
        for level in range(LEVELS):
            _vae_residual(part.under(f"{levels}.{level}.block.0."))
            if level != last:
                part.smooth(f"{levels}.{level}.{step}.conv", WIDTH, WIDTH, 3, 3)
        part.norm("norm_out", WIDTH)
        part.smooth("conv_out", outside, WIDTH, 3, 3, gain=0.6, mean=SILU_MEAN)


def _vae_residual(weights: Weights) -> None:
    for number in (1, 2):
        weights.norm(f"norm{number}", WIDTH)
        weights.smooth(f"conv{number}", WIDTH, WIDTH, 3, 3, gain=1.0 if number == 1 else 0.3, mean=SILU_MEAN)


def _clip(weights: Weights) -> None:
    weights.put("embeddings.token_embedding.weight", weights.normal(VOCABULARY, TEXT_WIDTH))
    weights.put("embeddings.position_embedding.weight", weights.normal(ROW_LENGTH, TEXT_WIDTH) * 0.3)
    weights.put("embeddings.position_ids", torch.arange(ROW_LENGTH)[None])
    for number in range(TEXT_LAYERS):
        layer = weights.under(f"encoder.layers.{number}.")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer.kernel(f"self_attn.{name}", TEXT_WIDTH, TEXT_WIDTH)
        layer.norm("layer_norm1", TEXT_WIDTH)
        layer.norm("layer_norm2", TEXT_WIDTH)
        layer.kernel("mlp.fc1", TEXT_HIDDEN, TEXT_WIDTH)
        layer.kernel("mlp.fc2", TEXT_WIDTH, TEXT_HIDDEN)
    weights.norm("final_layer_norm", TEXT_WIDTH)

"""The miniature ACE-Step checkpoint: the published file's layout with thin networks of random weights.

It exercises every code path of the real model and makes noise, not music: three minutes in under half a minute on two
cores. Tags and lyrics work through a sentencepiece model and a lyric vocabulary of its own, inside the file. The last
layers are scaled so that the sound is neither silent nor clipped.
"""

from __future__ import annotations

import json
import math
import string

import torch
from torch import Tensor

from comfyfleet.engine.miniatures.pieces import ROWS as TEXT_ROWS
from comfyfleet.engine.miniatures.pieces import sentencepiece_model
from comfyfleet.engine.miniatures.weights import Tensors, Weights
from comfyfleet.engine.models.ace import OWN_VOCABULARY
from comfyfleet.engine.models.ace_lyrics.tokenizer import LANGUAGES, LINE_END_ID, START_ID, TAGS

CHECKPOINT = "ace_step_v1_3.5b.safetensors"

WIDTH, HIDDEN, PATCH_WIDTH, TEXT_WIDTH, SPEAKER_WIDTH = 128, 256, 64, 32, 512
LYRIC_WIDTH, LYRIC_HEADS, LYRIC_HIDDEN = 16, 2, 32
TEXT_INNER, TEXT_HEADS, TEXT_HIDDEN = 32, 2, 64
LEVELS = (8, 8, 16, 32)  # of the autoencoder, finest first
LATENTS, CHANNELS, MELS = 8, 2, 128
BACKBONE, SOUND, RATES, SOUND_KERNEL = 16, 16, (8, 8, 8), 3
LOUDNESS = 0.2  # of the last layer: a song's deviation comes out between 0.1 and 0.2

# The commonest pairs of English letters are pieces of their own, so lyrics take about as many as with the real one.
PAIRS = [
    "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "ed", "is", "it", "al", "ar",
    "st", "to", "nt", "ng", "se", "ha", "as", "ou", "le", "ve", "co", "me", "de", "hi", "ri", "ro", "ic", "ne", "ea",
    "ra", "ce", "li", "ch", "ll", "be", "ma", "si", "om", "ur",
]  # fmt: skip


def tensors(seed: int) -> tuple[Tensors, dict[str, str]]:
    """The file's tensors (float32) and metadata, the same for the same seed."""
    weights = Weights(seed)
    _transformer(weights.under("model.diffusion_model."), rows=1 + max(lyric_ids().values()))
    _text_encoder(weights.under("text_encoders.umt5base.transformer."))
    _autoencoder(weights.under("vae.dcae."))
    _vocoder(weights.under("vae.vocoder."))
    weights.put("text_encoders.spiece_model", sentencepiece_model())
    weights.put(OWN_VOCABULARY, torch.frombuffer(bytearray(lyric_vocabulary().encode()), dtype=torch.uint8))
    return weights.tensors, {"miniature": "true"}


def lyric_ids() -> dict[str, int]:
    """Pieces of the lyric vocabulary: letters, pairs, language tags; opening and line end as everywhere."""
    letters = string.ascii_lowercase + string.digits + "!'(),-./:?[]" + "àáâãäåçèéêëìíîïñòóôõöøùúûüýœßæ"
    tags = [f"[{TAGS.get(language, language)}]" for language in sorted(LANGUAGES)]
    ids = {"[STOP]": 0, "[UNK]": 1, "[SPACE]": LINE_END_ID, "[START]": START_ID}
    ids |= {piece: 3 + place for place, piece in enumerate([*letters, *PAIRS])}
    return ids | {tag: START_ID + 1 + place for place, tag in enumerate(tags)}


def lyric_vocabulary() -> str:
    """Those pieces as JSON in the `tokenizers` format."""
    ids = lyric_ids()
    special = [piece for piece in ids if len(piece) > 2]
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": ids[piece], "content": piece, **flags} for piece in special],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "unk_token": "[UNK]", "vocab": ids, "merges": [" ".join(pair) for pair in PAIRS]},
    }
    return json.dumps(content)


def _transformer(weights: Weights, *, rows: int) -> None:
    weights.kernel("proj_in.early_conv_layers.0", PATCH_WIDTH, LATENTS, 16, 1)
    weights.norm("proj_in.early_conv_layers.1", PATCH_WIDTH)
    weights.kernel("proj_in.early_conv_layers.2", WIDTH, PATCH_WIDTH, 1, 1)
    weights.kernel("timestep_embedder.linear_1", WIDTH, 256)
    weights.kernel("timestep_embedder.linear_2", WIDTH, WIDTH)
    weights.kernel("t_block.1", 6 * WIDTH, WIDTH, gain=0.3)
    weights.kernel("speaker_embedder", WIDTH, SPEAKER_WIDTH)
    weights.kernel("genre_embedder", WIDTH, TEXT_WIDTH)
    weights.put("lyric_embs.weight", weights.normal(rows, LYRIC_WIDTH))
    weights.kernel("lyric_proj", WIDTH, LYRIC_WIDTH)
    _lyric_encoder(weights.under("lyric_encoder."))
    block = weights.under("transformer_blocks.0.")
    block.put("scale_shift_table", weights.normal(6, WIDTH) * 0.3)
    for attention in ("attn", "cross_attn"):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            block.kernel(f"{attention}.{part}", WIDTH, WIDTH)
    block.kernel("ff.inverted_conv.conv", 2 * HIDDEN, WIDTH, 1)
    block.kernel("ff.depth_conv.conv", 2 * HIDDEN, 1, 3)
    block.kernel("ff.point_conv.conv", WIDTH, HIDDEN, 1, bias=False)
    weights.put("final_layer.scale_shift_table", weights.normal(2, WIDTH) * 0.3)
    weights.kernel("final_layer.linear", 16 * LATENTS, WIDTH)


def _lyric_encoder(weights: Weights) -> None:
    weights.kernel("embed.out.0", LYRIC_WIDTH, LYRIC_WIDTH)
    weights.norm("embed.out.1", LYRIC_WIDTH)
    weights.norm("after_norm", LYRIC_WIDTH)
    layer = weights.under("encoders.0.")
    for part in ("q", "k", "v", "out"):
        layer.kernel(f"self_attn.linear_{part}", LYRIC_WIDTH, LYRIC_WIDTH)
    layer.kernel("self_attn.linear_pos", LYRIC_WIDTH, LYRIC_WIDTH, bias=False)
    layer.put("self_attn.pos_bias_u", weights.normal(LYRIC_HEADS, LYRIC_WIDTH // LYRIC_HEADS))
    layer.put("self_attn.pos_bias_v", weights.normal(LYRIC_HEADS, LYRIC_WIDTH // LYRIC_HEADS))
    layer.kernel("feed_forward.w_1", LYRIC_HIDDEN, LYRIC_WIDTH)
    layer.kernel("feed_forward.w_2", LYRIC_WIDTH, LYRIC_HIDDEN)
    layer.norm("norm_mha", LYRIC_WIDTH)
    layer.norm("norm_ff", LYRIC_WIDTH)


def _text_encoder(weights: Weights) -> None:
    weights.put("shared.weight", weights.normal(TEXT_ROWS, TEXT_WIDTH))
    weights.norm("encoder.final_layer_norm", TEXT_WIDTH, bias=False)
    attention = weights.under("encoder.block.0.layer.0.")
    for part in ("q", "k", "v"):
        attention.kernel(f"SelfAttention.{part}", TEXT_INNER, TEXT_WIDTH, gain=0.5, bias=False)
    attention.kernel("SelfAttention.o", TEXT_WIDTH, TEXT_INNER, bias=False)
    attention.put("SelfAttention.relative_attention_bias.weight", weights.normal(32, TEXT_HEADS))
    attention.norm("layer_norm", TEXT_WIDTH, bias=False)
    forward = weights.under("encoder.block.0.layer.1.")
    forward.kernel("DenseReluDense.wi_0", TEXT_HIDDEN, TEXT_WIDTH, bias=False)
    forward.kernel("DenseReluDense.wi_1", TEXT_HIDDEN, TEXT_WIDTH, bias=False)
    forward.kernel("DenseReluDense.wo", TEXT_WIDTH, TEXT_HIDDEN, bias=False)
    forward.norm("layer_norm", TEXT_WIDTH, bias=False)


def _autoencoder(weights: Weights) -> None:
    finest, coarsest = LEVELS[0], LEVELS[-1]
    last = len(LEVELS) - 1
    decoder, encoder = weights.under("decoder."), weights.under("encoder.")
    decoder.kernel("conv_in", coarsest, LATENTS, 3, 3, gain=0.3)
    decoder.norm("norm_out", finest)
    decoder.kernel("conv_out", CHANNELS, finest, 3, 3, gain=0.4)
    encoder.kernel("conv_in", finest, CHANNELS, 3, 3)
    encoder.kernel("conv_out", LATENTS, coarsest, 3, 3)
    attention_block(decoder.under(f"up_blocks.{last}.0."), coarsest)
    attention_block(encoder.under(f"down_blocks.{last}.0."), coarsest)
    for level in range(last):
        fine, coarse = LEVELS[level], LEVELS[level + 1]
        decoder.kernel(f"up_blocks.{level}.0.conv", fine, coarse, 3, 3, gain=0.3)
        residual_block(decoder.under(f"up_blocks.{level}.1."), fine)
        residual_block(encoder.under(f"down_blocks.{level}.0."), fine)
        encoder.kernel(f"down_blocks.{level}.1.conv", coarse, fine, 3, 3, gain=0.3)


def residual_block(weights: Weights, width: int) -> None:
    weights.kernel("conv1", width, width, 3, 3)
    weights.kernel("conv2", width, width, 3, 3, bias=False)
    weights.norm("norm", width)


def attention_block(weights: Weights, width: int) -> None:
    for part in ("to_q", "to_k", "to_v"):
        weights.kernel(f"attn.{part}", width, width, bias=False)
    weights.kernel("attn.to_qkv_multiscale.0.proj_in", 3 * width, 1, 5, 5, bias=False)
    weights.kernel("attn.to_qkv_multiscale.0.proj_out", 3 * width, 32, 1, 1, bias=False)
    weights.kernel("attn.to_out", width, 2 * width, bias=False)
    weights.norm("attn.norm_out", width)
    weights.kernel("conv_out.conv_inverted", 8 * width, width, 1, 1)
    weights.kernel("conv_out.conv_depth", 8 * width, 1, 3, 3)
    weights.kernel("conv_out.conv_point", width, 4 * width, 1, 1, bias=False)
    weights.norm("conv_out.norm", width)


def _vocoder(weights: Weights) -> None:
    backbone, head = weights.under("backbone."), weights.under("head.")
    backbone.kernel("channel_layers.0.0", BACKBONE, MELS, 7, gain=0.2)
    backbone.norm("channel_layers.0.1", BACKBONE)
    block = backbone.under("stages.0.0.")
    block.kernel("dwconv", BACKBONE, 1, 7)
    block.norm("norm", BACKBONE)
    block.kernel("pwconv1", 4 * BACKBONE, BACKBONE)
    block.kernel("pwconv2", BACKBONE, 4 * BACKBONE)
    block.put("gamma", torch.full((BACKBONE,), 0.5))
    backbone.norm("norm", BACKBONE)
    normed_kernel(head, "conv_pre", weights.normal(SOUND, BACKBONE, 13), gain=1.0)
    width, last = SOUND, len(RATES) - 1
    for step, rate in enumerate(RATES):
        # Rows of a transposed convolution are its inputs: each output sums two taps of every one of them. The last one
        # only interpolates, so the noise has no treble: easier on the ear, and on the MP3 encoder.
        smooth = torch.hann_window(2 * rate) if step == last else weights.normal(width, 1, 2 * rate)
        taps = weights.normal(width, width // 2, 1) * smooth
        normed_kernel(head, f"ups.{step}", taps, gain=math.sqrt(rate), biases=width // 2)
        width //= 2
        for number in range(3):
            for part in ("convs1", "convs2"):
                taps = weights.normal(width, width, SOUND_KERNEL)
                normed_kernel(head, f"resblocks.{step}.{part}.{number}", taps, gain=0.3 if step == last else 1.0)
    normed_kernel(head, "conv_post", weights.normal(1, width, 1) * torch.hann_window(15)[1:-1], gain=LOUDNESS)


def normed_kernel(weights: Weights, name: str, direction: Tensor, *, gain: float, biases: int | None = None) -> None:
    """Weight normalisation's pair: a direction and, per row, the magnitude that keeps deviations, times `gain`."""
    rows = direction.shape[0]
    weights.put(f"{name}.parametrizations.weight.original1", direction)
    weights.put(f"{name}.parametrizations.weight.original0", torch.full((rows, 1, 1), gain))
    weights.put(f"{name}.bias", torch.zeros(rows if biases is None else biases))

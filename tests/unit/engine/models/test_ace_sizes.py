"""Sizes come from shapes: networks of other depths and widths than the goldens' decode alike in windows."""

import math

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.miniatures.ace import attention_block, normed_kernel, residual_block
from comfyfleet.engine.miniatures.weights import Weights
from comfyfleet.engine.models.ace_dcae import AceDcae
from comfyfleet.engine.models.ace_vocoder import AceVocoder
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.residency import Precision, Resident, Source
from engine_goldens import relative_error


def built(kind, weights, folder):
    """A network of `kind` with these weights, from a file."""
    path = folder / "some.safetensors"
    save_file(weights.tensors, path)
    precision = Precision(on_cuda=torch.bfloat16)
    return Resident(Source(checkpoint=open_checkpoint(path), build=kind, precision=precision)).network()


def vocoder_weights(*, initial, rates, kernels, depths, widths, mels=128):
    """A vocoder's tensors under the published names."""
    weights = Weights(1)
    backbone, head = weights.under("backbone."), weights.under("head.")
    backbone.kernel("channel_layers.0.0", widths[0], mels, 7)
    backbone.norm("channel_layers.0.1", widths[0])
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            backbone.norm(f"channel_layers.{stage}.0", widths[stage - 1])
            backbone.kernel(f"channel_layers.{stage}.1", width, widths[stage - 1], 1)
        for number in range(depth):
            block = backbone.under(f"stages.{stage}.{number}.")
            block.kernel("dwconv", width, 1, 7)
            block.norm("norm", width)
            block.kernel("pwconv1", 4 * width, width)
            block.kernel("pwconv2", width, 4 * width)
            block.put("gamma", torch.ones(width))
    backbone.norm("norm", widths[-1])
    normed_kernel(head, "conv_pre", weights.normal(initial, widths[-1], 13), gain=1.0)
    width = initial
    for step, rate in enumerate(rates):
        taps = weights.normal(width, width // 2, 2 * rate)
        normed_kernel(head, f"ups.{step}", taps, gain=math.sqrt(rate), biases=width // 2)
        width //= 2
        for place, kernel in enumerate(kernels):
            for part in ("convs1", "convs2"):
                for number in range(3):
                    name = f"resblocks.{step * len(kernels) + place}.{part}.{number}"
                    normed_kernel(head, name, weights.normal(width, width, kernel), gain=1.0)
    normed_kernel(head, "conv_post", weights.normal(1, width, 13), gain=0.5)
    return weights


@torch.no_grad()
@pytest.mark.parametrize(
    ("rates", "kernels", "depths"),
    [
        ((4, 4, 2, 2, 2, 2, 2), (3, 7, 11, 13), (3, 3, 9, 3)),  # the published vocoder's plan
        ((8, 8, 2, 2, 2), (3, 7, 11), (1, 2)),
    ],
)
def test_a_vocoder_of_any_plan_sounds_alike_in_windows(rates, kernels, depths, tmp_path):
    widths = (8, 8, 16, 16)[: len(depths)]
    weights = vocoder_weights(initial=128, rates=rates, kernels=kernels, depths=depths, widths=widths)
    vocoder = built(AceVocoder, weights, tmp_path)
    mel = torch.randn(1, 128, 150, generator=torch.Generator().manual_seed(2))

    whole = vocoder(mel, backbone_window=150, head_window=150)

    assert vocoder.head.factor == 512
    assert whole.shape == (1, 150 * 512)
    assert relative_error(vocoder(mel, backbone_window=60, head_window=50), whole) <= 1e-5


@torch.no_grad()
def test_an_autoencoder_of_the_published_depth_decodes_alike_in_windows(tmp_path):
    weights = Weights(1)
    levels, depth = (8, 16, 32, 64), 3
    decoder, encoder = weights.under("decoder."), weights.under("encoder.")
    decoder.kernel("conv_in", levels[-1], 8, 3, 3)
    decoder.norm("norm_out", levels[0])
    decoder.kernel("conv_out", 2, levels[0], 3, 3)
    encoder.kernel("conv_in", levels[0], 2, 3, 3)
    encoder.kernel("conv_out", 8, levels[-1], 3, 3)
    for level, width in enumerate(levels):
        is_last = level == len(levels) - 1
        if not is_last:
            decoder.kernel(f"up_blocks.{level}.0.conv", width, levels[level + 1], 3, 3)
            encoder.kernel(f"down_blocks.{level}.{depth}.conv", levels[level + 1], width, 3, 3)
        for number in range(depth):
            for block in (
                decoder.under(f"up_blocks.{level}.{number + (not is_last)}."),
                encoder.under(f"down_blocks.{level}.{number}."),
            ):
                attention_block(block, width) if is_last else residual_block(block, width)
    dcae = built(AceDcae, weights, tmp_path)
    latents = torch.randn(1, 8, 16, 50, generator=torch.Generator().manual_seed(2))

    whole = dcae.decoder(latents, window=50)

    assert whole.shape == (1, 2, 128, 400)
    assert relative_error(dcae.decoder(latents, window=9), whole) <= 1e-5
    assert dcae.encoder(whole).shape == latents.shape

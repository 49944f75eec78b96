"""Sizes that no golden has, against independent implementations (diffusers, transformers) given the same weights."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.miniatures.wan_vae import tensors as miniature_film_tensors
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.lora import NO_PATCHES
from comfyfleet.engine.models.residency import Precision, fill
from comfyfleet.engine.models.sd15 import Unet, open_unet
from comfyfleet.engine.models.umt5 import Umt5
from comfyfleet.engine.models.wan import WanSizes, WanTransformer, open_wan
from comfyfleet.engine.models.wan_vae import WanVae, open_wan_vae
from comfyfleet.engine.values import ConditioningEntry
from engine_goldens import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def witnesses():
    """diffusers and transformers, imported with their own warnings silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers
        from diffusers.loaders import single_file_utils
    return diffusers, transformers, single_file_utils


def random_like(module, seed):
    """A value for every parameter that keeps signals about as large as they come."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name or "gamma" in name or ".in_layers.0" in name or ".out_layers.0" in name
        if name.endswith("weight") and parameter.dim() > 1 and "embed_tokens" not in name and "shared" not in name:
            value /= math.sqrt(math.prod(parameter.shape[1:]))
        made[name] = 1.0 + 0.1 * value if is_norm and not name.endswith("bias") else value
    return made


def written(tmp_path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "file.safetensors")
    return open_checkpoint(tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    ("width", "blocks", "patch", "shape"),
    [
        (256, 3, (1, 2, 2), (1, 16, 3, 6, 10)),
        (128, 2, (1, 4, 4), (2, 16, 2, 8, 4)),
        (384, 1, (2, 2, 2), (1, 16, 4, 4, 2)),
    ],
)
def test_wan_transformers_of_other_sizes(tmp_path, witnesses, width, blocks, patch, shape):
    diffusers, _, converters = witnesses
    sizes = WanSizes(
        width=width,
        ffn_width=3 * width,
        blocks=blocks,
        channels_in=16,
        channels_out=16,
        text_width=48,
        time_width=256,
        patch=patch,
    )
    tensors = random_like(WanTransformer(sizes), seed=width)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=patch,
        num_attention_heads=width // 128,
        attention_head_dim=128,
        text_dim=48,
        ffn_dim=3 * width,
        num_layers=blocks,
    ).eval()
    theirs.load_state_dict(converters.convert_wan_transformer_to_diffusers(dict(tensors)))
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(shape, generator=generator), torch.randn(shape[0], 9, 48, generator=generator)
    timestep = torch.full((shape[0],), 731.0)

    ours = open_wan(written(tmp_path, tensors)).forward(x, timestep, ConditioningEntry(embedding=context))

    with torch.no_grad():
        expected = theirs(x, timestep, context, return_dict=False)[0]
    assert relative_error(ours, expected) <= 2e-5


@pytest.mark.parametrize("base", [4, 6])
def test_film_autoencoders_of_other_widths_both_ways(tmp_path, witnesses, base):
    diffusers, _, converters = witnesses
    theirs = diffusers.AutoencoderKLWan(base_dim=base, temperal_downsample=[False, True, True]).eval()
    thin, _ = miniature_film_tensors(base, base=base)
    tensors = random_like(WanVae(written(tmp_path, thin)), base)
    theirs.load_state_dict(converters.convert_wan_vae_to_diffusers(dict(tensors)))
    vae = open_wan_vae(written(tmp_path, tensors))
    generator = torch.Generator().manual_seed(2)
    film, latents = torch.rand(9, 24, 16, 3, generator=generator), torch.randn(1, 16, 3, 3, 2, generator=generator)

    encoded, decoded = vae.encode(film), torch.cat(list(vae.decode(latents)))

    with torch.no_grad():
        their_latent = theirs.encode(film.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode()
        their_film = (theirs.decode(latents).sample[0].permute(1, 2, 3, 0) + 1) / 2
    assert relative_error(encoded, their_latent) <= 2e-5
    assert relative_error(decoded, their_film.clamp(0, 1)) <= 2e-5


def test_a_umt5_of_another_size(tmp_path, witnesses):
    _, transformers, _ = witnesses
    config = transformers.UMT5Config(
        vocab_size=300, d_model=40, d_kv=12, d_ff=72, num_layers=3, num_heads=5, feed_forward_proj="gated-gelu"
    )
    theirs = transformers.UMT5EncoderModel(config).eval()
    names = {name: value for name, value in theirs.state_dict().items() if "embed_tokens" not in name}
    section = written(tmp_path, {name: torch.randn(value.shape) * 0.2 for name, value in names.items()})
    theirs.load_state_dict({name: section.tensor(name).clone() for name in section}, strict=False)
    ids = torch.randint(2, 300, (2, 140), generator=torch.Generator().manual_seed(3))

    network = Umt5(section)
    fill(network, section, "cpu", Precision(on_cuda=torch.float16), NO_PATCHES)
    with torch.no_grad():
        ours, expected = network(ids, None, torch.float32), theirs(input_ids=ids).last_hidden_state
    assert relative_error(ours, expected) <= 2e-5


def unet_shapes(widths, *, blocks, time_width, text_width):
    """Names and shapes of an SD1.5-like UNet in the published layout: attention everywhere but at the last level."""
    shapes = {}

    def linear(path, outputs, *inputs, bias=True):
        shapes[f"{path}.weight"] = (outputs, *inputs)
        if bias:
            shapes[f"{path}.bias"] = (outputs,)

    def residual(path, inside, width):
        linear(f"{path}.in_layers.0", inside)
        linear(f"{path}.in_layers.2", width, inside, 3, 3)
        linear(f"{path}.emb_layers.1", width, time_width)
        linear(f"{path}.out_layers.0", width)
        linear(f"{path}.out_layers.3", width, width, 3, 3)
        if inside != width:
            linear(f"{path}.skip_connection", width, inside, 1, 1)

    def transformer(path, width):
        linear(f"{path}.norm", width)
        block = f"{path}.transformer_blocks.0"
        for name in ("proj_in", "proj_out"):
            linear(f"{path}.{name}", width, width, 1, 1)
        for name, context in (("attn1", width), ("attn2", text_width)):
            linear(f"{block}.{name}.to_q", width, width, bias=False)
            linear(f"{block}.{name}.to_k", width, context, bias=False)
            linear(f"{block}.{name}.to_v", width, context, bias=False)
            linear(f"{block}.{name}.to_out.0", width, width)
        for number in (1, 2, 3):
            linear(f"{block}.norm{number}", width)
        linear(f"{block}.ff.net.0.proj", 8 * width, width)
        linear(f"{block}.ff.net.2", width, 4 * width)

    last = len(widths) - 1
    linear("time_embed.0", time_width, widths[0])
    linear("time_embed.2", time_width, time_width)
    linear("input_blocks.0.0", widths[0], 4, 3, 3)
    place, inside, passed = 1, widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(blocks):
            residual(f"input_blocks.{place}.0", inside, width)
            if level != last:
                transformer(f"input_blocks.{place}.1", width)
            place, inside = place + 1, width
            passed.append(width)
        if level != last:
            linear(f"input_blocks.{place}.0.op", width, width, 3, 3)
            place += 1
            passed.append(width)
    residual("middle_block.0", inside, inside)
    transformer("middle_block.1", inside)
    residual("middle_block.2", inside, inside)
    place = 0
    for level in reversed(range(len(widths))):
        for within in range(blocks + 1):
            residual(f"output_blocks.{place}.0", inside + passed.pop(), widths[level])
            inside = widths[level]
            if level != last:
                transformer(f"output_blocks.{place}.1", inside)
            if within == blocks and level:
                linear(f"output_blocks.{place}.{2 if level != last else 1}.conv", inside, inside, 3, 3)
            place += 1
    linear("out.0", widths[0])
    linear("out.2", 4, widths[0], 3, 3)
    return shapes


def test_a_unet_of_published_proportions(tmp_path, witnesses):
    diffusers, _, converters = witnesses
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 96), layers_per_block=2, cross_attention_dim=20, attention_head_dim=8
    ).eval()
    section = written(
        tmp_path,
        {
            name: torch.zeros(shape)
            for name, shape in unet_shapes((32, 64, 64, 96), blocks=2, time_width=128, text_width=20).items()
        },
    )
    tensors = random_like(Unet(section), seed=5)
    converted = converters.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, {**theirs.config}
    )
    theirs.load_state_dict(converted)
    generator = torch.Generator().manual_seed(6)
    x, context = torch.randn(1, 4, 17, 11, generator=generator), torch.randn(1, 77, 20, generator=generator)

    ours = open_unet(written(tmp_path, tensors)).forward(x, torch.tensor([321.0]), ConditioningEntry(embedding=context))

    with torch.no_grad():
        expected = theirs(x, torch.tensor([321.0]), context).sample
    assert relative_error(ours, expected) <= 2e-5

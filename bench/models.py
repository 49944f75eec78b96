"""Wan and SD1.5: the documents' film and benchmark picture in their parts on the CPU, and full-size steps on a GPU.

On the CPU the miniatures are measured at the documents' sizes. On a GPU the networks have the published sizes and
random weights (values do not change speed); a step's baseline is the card's dense half-precision limit (790 TFLOP/s on
an H200). Work per forward (multiply-add = 2): the feasibility report's counts, attention included.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.figure import Figure
from comfyfleet.engine.miniatures import ensure
from comfyfleet.engine.models.layers import Linear, fastest_attention
from comfyfleet.engine.models.open_file import open_all_in_one, open_diffusion, open_text_encoder, open_vae
from comfyfleet.engine.models.wan import WanSizes, WanTransformer
from comfyfleet.engine.sampling.noise import initial_noise
from comfyfleet.engine.sampling.sample import sample
from comfyfleet.engine.sampling.schedules import FlowSigmas, cut, schedule
from comfyfleet.engine.values import Conditioning, DiffusionModel

FILM = (1, 16, 21, 80, 80)  # 640 x 640, 81 frames
STEPS, HANDOVER, CFG = 20, 10, 3.5
PROMPT = "A woman turns her head over her shoulder, soft light, slow motion."
UMT5, VAE = "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "vae/wan_2.1_vae.safetensors"
EXPERT = "diffusion_models/wan2.2_t2v_{}_noise_14B_fp8_scaled.safetensors"
SD15 = "checkpoints/v1-5-pruned-emaonly-fp16.safetensors"

A14B = WanSizes(
    width=5120,
    ffn_width=13824,
    blocks=40,
    channels_in=16,
    channels_out=16,
    text_width=4096,
    time_width=256,
    patch=(1, 2, 2),
)
FORWARD_TFLOP = 1744.0
H200_TFLOPS = 790.0
STEP_GOAL_S = 6.0
GPU_ROUNDS = 3


def figures() -> list[Figure]:
    """About 40 seconds on two idle cores; two minutes more with a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        making_s = _timed(lambda: ensure(folder))[1]
        found = [
            _seconds("miniatures made", making_s, goal=10.0),
            *_film(Path(folder)),
            *_picture(Path(folder)),
        ]
    return [*found, *_full_size_step()] if torch.cuda.is_available() else found


def _film(folder: Path) -> list[Figure]:
    encoder = open_text_encoder(str(folder / UMT5), "wan", "cpu")
    prompt, text_s = _timed(lambda: (encoder.encode(PROMPT),))
    latent, sampling_s = _timed(lambda: _two_experts(folder, prompt))
    vae = open_vae(str(folder / VAE), "cpu")
    _, decoding_s = _timed(lambda: sum(len(frames) for frames in vae.decode(latent)))
    return [
        _seconds("Wan seed, text", text_s),
        _seconds(f"Wan seed, sampling, {STEPS} steps", sampling_s),
        _seconds("Wan seed, decoding 81 frames", decoding_s),
        _seconds("Wan seed, without H.264", text_s + sampling_s + decoding_s, goal=55.0),
    ]


def _two_experts(folder: Path, prompt: Conditioning) -> torch.Tensor:
    latent = torch.zeros(FILM)
    noise = initial_noise(latent, 1)
    for name, noise_of, start, end in (("high", noise, 0, HANDOVER), ("low", torch.zeros(FILM), HANDOVER, 10_000)):
        model = replace(open_diffusion(str(folder / EXPERT.format(name)), "cpu"), sigmas=FlowSigmas(8.0))
        sigmas = schedule(model.sigmas, scheduler="simple", sampler_name="euler", steps=STEPS)
        sigmas = cut(sigmas, start=start, end=end, leftover_noise=end == HANDOVER)
        latent = _sampled(model, prompt, latent, noise_of, sigmas, CFG)
    return latent


def _picture(folder: Path) -> list[Figure]:
    (model, encoder, vae), loading_s = _timed(lambda: open_all_in_one(str(folder / SD15), "cpu"))
    prompt: Conditioning = (encoder.encode(PROMPT),)
    latent = torch.zeros(1, 4, 64, 64)
    sigmas = schedule(model.sigmas, scheduler="normal", sampler_name="euler", steps=STEPS)
    latent, sampling_s = _timed(lambda: _sampled(model, prompt, latent, initial_noise(latent, 1), sigmas, 8.0))
    _, decoding_s = _timed(lambda: list(vae.decode(latent)))  # type: ignore[union-attr]
    return [_seconds("SD1.5 benchmark, without PNG", loading_s + sampling_s + decoding_s, goal=3.0)]


def _sampled(
    model: DiffusionModel,
    prompt: Conditioning,
    latent: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    cfg: float,
) -> torch.Tensor:
    return sample(
        model,
        noise=noise,
        latent=latent,
        positive=prompt,
        negative=prompt,
        cfg=cfg,
        sampler_name="euler",
        sigmas=sigmas,
        seed=1,
    )


@torch.no_grad()
def _full_size_step() -> list[Figure]:
    """Seconds of one guided step (two forwards) of a 14 B expert in scaled fp8 at the documents' size."""
    device, dtype = "cuda:0", torch.float16
    network = _random_expert(device, dtype)
    x = torch.randn(FILM, device=device, dtype=dtype)
    time_of = torch.full((1,), 900.0, device=device)
    texts = network.read_text(torch.randn(1, 512, A14B.text_width, device=device, dtype=dtype))

    def step() -> None:
        with fastest_attention(device, dtype):
            network(x, time_of, texts)
            network(x, time_of, texts)
        torch.cuda.synchronize()

    step()
    seconds = min(_timed(step)[1] for _ in range(GPU_ROUNDS))
    limit = 2 * FORWARD_TFLOP / H200_TFLOPS
    return [
        Figure(
            name="Wan seed, a full-size step", value=seconds, unit="s", goal=STEP_GOAL_S, better="lower", baseline=limit
        ),
        Figure(
            name="Wan seed, a full-size step's work",
            value=2 * FORWARD_TFLOP / seconds,
            unit="TFLOP/s",
            goal=None,
            better="higher",
            baseline=H200_TFLOPS,
        ),
    ]


def _random_expert(device: str, dtype: torch.dtype) -> WanTransformer:
    """The published network with weights from nowhere: Linear weights in scaled fp8, all else in half precision."""
    network = WanTransformer(A14B)
    for layer in network.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02
            if isinstance(layer, Linear) and name == "weight":
                value, layer.scale = value.to(torch.float8_e4m3fn), torch.tensor(1.0, device=device)
            setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    return network


def _seconds(name: str, value: float, goal: float | None = None) -> Figure:
    return Figure(name=name, value=value, unit="s", goal=goal, better="lower")


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started

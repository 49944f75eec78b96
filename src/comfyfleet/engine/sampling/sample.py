"""One sampler run: scale in, walk the sigmas, scale out.

Knows models by their values only (`DiffusionModel`); which sigmas to walk is decided before (`schedules.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from comfyfleet.engine.sampling.guidance import Guide
from comfyfleet.engine.sampling.noise import device_noise, initial_noise
from comfyfleet.engine.sampling.run import Denoise, DenoisePair, SamplerRun, noised
from comfyfleet.engine.sampling.samplers import SAMPLERS
from comfyfleet.engine.values import Conditioning, ConditioningEntry, DiffusionModel

# (step from 0, steps in all, x0 in the network's scale, x); raises to stop the run between steps
StepCallback = Callable[[int, int, Tensor, Tensor], None]


def fitted(model: DiffusionModel, samples: Tensor) -> Tensor:
    """The latent in the model's form: an empty one takes its channels, a picture becomes a film of one frame.

    Raises ValueError for a latent of another family: its values would mean nothing here.
    """
    wanted = model.latent_format
    if wanted.axes == 3 and samples.dim() == 4:
        samples = samples.unsqueeze(2)
    if samples.shape[1] != wanted.channels and torch.count_nonzero(samples) == 0:
        samples = samples.new_zeros(samples.shape[0], wanted.channels, *samples.shape[2:])
    if samples.shape[1] != wanted.channels or samples.dim() != wanted.axes + 2:
        raise ValueError(
            f"latent_image of shape {tuple(samples.shape)} is of another model family: a {model.family} model takes "
            f"{wanted.channels} channels and {wanted.axes} axes after them"
        )
    return samples


@torch.no_grad()
def sample(
    model: DiffusionModel,
    *,
    noise: Tensor,
    latent: Tensor,
    positive: Conditioning,
    negative: Conditioning,
    cfg: float,
    sampler_name: str,
    sigmas: Tensor,
    seed: int,
    callback: StepCallback | None = None,
    noise_mask: Tensor | None = None,
) -> Tensor:
    """The denoised latent, in the VAE's scale, float32 on the CPU.

    noise, latent: (B, …) on the CPU, unit noise and VAE scale. sigmas: (n + 1,) from `schedule` or `cut`; empty means
    nothing to do. noise_mask: 1 where the latent may change. Flow: enters as sigma noise + (1 - sigma) latent, leaves
    divided by 1 - sigma_last; epsilon: enters as latent + noise x sigma, x sqrt(1 + sigma^2) at the largest sigma.
    """
    if len(sigmas) < 2:
        return latent
    device = torch.device(model.network.device)
    noise = noise.to(device=device, dtype=torch.float32)
    latent = latent.to(torch.float32)
    if torch.count_nonzero(latent) > 0:  # an empty latent stays zero: it is no picture, so it has no scale
        latent = model.latent_format.to_network(latent)
    latent = latent.to(device)

    is_flow = model.prediction == "flow"
    guide = Guide(model, positive=_on(device, positive), negative=_on(device, negative), scale=cfg, noise=noise)
    denoise: Denoise = guide
    denoise_pair: DenoisePair = guide.pair
    if noise_mask is not None:
        mask = _mask_like(noise_mask.to(device), noise)
        shown_noise = initial_noise(noise, seed + 1).to(device) if sampler_name == "ddim" else noise
        denoise, denoise_pair = _masked(guide, mask, noise=shown_noise, latent=latent, is_flow=is_flow)

    steps = len(sigmas) - 1

    def on_step(step: int, x: Tensor, x0: Tensor) -> None:
        if callback is not None:
            callback(step, steps, x0, x)

    run = SamplerRun(
        denoise=denoise,
        denoise_pair=denoise_pair,
        sigmas=sigmas.to(device="cpu", dtype=torch.float32),
        table=model.sigmas,
        is_flow=is_flow,
        seed=seed,
        noise=device_noise(noise, seed),
        on_step=on_step,
    )
    try:
        x = SAMPLERS[sampler_name](run, _entered(noise, latent, run))
    finally:
        model.network.end_of_run()
    if is_flow:
        x = x / (1.0 - run.sigmas[-1])
    return model.latent_format.from_network(x.to(device="cpu", dtype=torch.float32))


def _entered(noise: Tensor, latent: Tensor, run: SamplerRun) -> Tensor:
    """The x that a run begins with: the latent at the first sigma's level."""
    sigma, largest = run.sigmas[0], run.table.sigmas[-1]
    if not run.is_flow and (sigma > largest or math.isclose(sigma, largest, rel_tol=1e-5)):
        # At the top the picture's own variance, 1, is made up for.
        return noise * torch.sqrt(1.0 + sigma**2.0) + latent
    return noised(noise, latent, sigma, is_flow=run.is_flow)


def _masked(guide: Guide, mask: Tensor, *, noise: Tensor, latent: Tensor, is_flow: bool) -> tuple[Denoise, DenoisePair]:
    """Predictions that keep the latent where the mask is 0: there the network is shown the latent, noised alike."""
    kept = 1.0 - mask

    def shown(x: Tensor, sigma: Tensor) -> Tensor:
        return x * mask + noised(noise, latent, sigma, is_flow=is_flow) * kept

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return guide(shown(x, sigma), sigma) * mask + latent * kept

    def denoise_pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        guided, negative_x0 = guide.pair(shown(x, sigma), sigma)
        return guided * mask + latent * kept, negative_x0

    return denoise, denoise_pair


def _mask_like(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (…, H, W) brought to the latent's shape: interpolated over space (and time), repeated over channels."""
    size = latent.shape[2:]
    if len(size) == 3:
        volume = mask if mask.dim() == 5 else mask.reshape(1, 1, -1, *mask.shape[-2:])
        mask = functional.interpolate(volume, size=size, mode="trilinear")
    else:
        mask = functional.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=size, mode="bilinear")
    repeats = -(-latent.shape[0] // mask.shape[0])
    mask = mask.repeat(repeats, *[1] * (mask.dim() - 1))[: latent.shape[0]]
    return mask.expand(-1, latent.shape[1], *size) if mask.shape[1] == 1 else mask[:, : latent.shape[1]]


def _on(device: torch.device, conditioning: Conditioning) -> Conditioning:
    return tuple(
        ConditioningEntry(
            embedding=entry.embedding.to(device),
            pooled=None if entry.pooled is None else entry.pooled.to(device),
            lyric_ids=None if entry.lyric_ids is None else entry.lyric_ids.to(device),
            lyrics_strength=entry.lyrics_strength,
        )
        for entry in conditioning
    )

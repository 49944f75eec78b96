"""What a sampler is given, and the few formulas that several samplers share.

A sampler is a function (SamplerRun, x) -> x: it walks `run.sigmas` from the noisy x down, asks `run.denoise` for the
clean latent as often as it likes, and calls `run.on_step` once per step. Sigmas and all coefficients are 0-dim float32
tensors on the CPU: they join tensors of any device without a copy, and comparing them never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from comfyfleet.engine.sampling.noise import NoiseSource
from comfyfleet.engine.values import SigmaTable

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> x0
DenoisePair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, sigma) -> (x0, the negative prompt's x0)
OnStep = Callable[[int, Tensor, Tensor], None]  # (step, x, x0); raises to stop the run


@dataclass(frozen=True, kw_only=True)
class SamplerRun:
    """One run of a sampler. `sigmas`: (n + 1,) float32 on the CPU, falling.

    `is_flow`: x = (1 - sigma) x0 + sigma noise; otherwise x = x0 + sigma noise.
    """

    denoise: Denoise
    denoise_pair: DenoisePair
    sigmas: Tensor
    table: SigmaTable
    is_flow: bool
    seed: int
    noise: NoiseSource  # fresh noise on x's device, for the samplers that add some at each step
    on_step: OnStep

    def steps(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, its sigma, the next sigma), in order."""
        for i, (sigma, sigma_next) in enumerate(pairwise(self.sigmas.unbind())):
            yield i, sigma, sigma_next


Sampler = Callable[[SamplerRun, Tensor], Tensor]


def noised(noise: Tensor, latent: Tensor, sigma: Tensor, *, is_flow: bool) -> Tensor:
    """A clean latent brought to noise level sigma."""
    return sigma * noise + (1.0 - sigma) * latent if is_flow else latent + noise * sigma


def half_log_snr(run: SamplerRun, sigma: Tensor) -> Tensor:
    """lambda = log(alpha / sigma): flow has alpha = 1 - sigma, the variance-exploding form alpha = 1."""
    return sigma.logit().neg() if run.is_flow else sigma.log().neg()


def sigma_of(run: SamplerRun, half_log_snr: Tensor) -> Tensor:
    """The inverse of `half_log_snr`."""
    return half_log_snr.neg().sigmoid() if run.is_flow else half_log_snr.neg().exp()


def starting_below_one(run: SamplerRun) -> SamplerRun:
    """The run with a flow's first sigma of 1, where lambda is minus infinity, moved 1e-4 of the way along."""
    if not run.is_flow or len(run.sigmas) <= 1 or run.sigmas[0] < 1:
        return run
    sigmas = run.sigmas.clone()
    sigmas[0] = run.table.percent_to_sigma(1e-4)
    return replace(run, sigmas=sigmas)


def ancestral_split(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up): step to `down`, then add noise of `up`, so that down^2 + up^2 = sigma_next^2.

    Source: Song et al. 2021 (DDIM), eq. 16 with eta 1, in sigmas.
    """
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    up = min(sigma_next, up)
    return (sigma_next**2 - up**2) ** 0.5, up


def flow_ancestral_split(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(down, scale, renoise) for a flow: step to `down`, then x = scale x + renoise noise has level sigma_next.

    down = sigma_next^2 / sigma; the rest keeps signal (1 - sigma_next) and total noise sigma_next.
    """
    down = sigma_next * (1 + (sigma_next / sigma - 1))
    alpha_next, alpha_down = 1 - sigma_next, 1 - down
    renoise = (sigma_next**2 - down**2 * alpha_next**2 / alpha_down**2) ** 0.5
    return down, alpha_next / alpha_down, renoise

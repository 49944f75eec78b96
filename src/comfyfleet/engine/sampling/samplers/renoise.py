"""Samplers that jump to the clean prediction and add fresh noise: DDPM's step and the consistency step."""

from __future__ import annotations

from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun, noised


def ddpm(run: SamplerRun, x: Tensor) -> Tensor:
    """The ancestral step of the variance-preserving chain, between any two levels. Source: Ho et al. 2020, algorithm 2.

    In the chain's own space x' = x / sqrt(1 + sigma^2), with a = 1 / (1 + sigma^2) for the running product of alphas.
    """
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        eps = (x - x0) / sigma
        kept, kept_next = 1 / (sigma * sigma + 1), 1 / (sigma_next * sigma_next + 1)
        alpha = kept / kept_next
        inside = x / (1.0 + sigma**2.0).sqrt()
        x = (1.0 / alpha).sqrt() * (inside - (1 - alpha) * eps / (1 - kept).sqrt())
        if sigma_next > 0:
            x = x + ((1 - alpha) * (1.0 - kept_next) / (1.0 - kept)).sqrt() * run.noise(sigma, sigma_next)
            x = x * (1.0 + sigma_next**2.0).sqrt()
    return x


def lcm(run: SamplerRun, x: Tensor) -> Tensor:
    """x0, noised afresh to the next level. Source: Luo et al. 2023 (LCM), algorithm 3."""
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        x = noised(run.noise(sigma, sigma_next), x0, sigma_next, is_flow=run.is_flow) if sigma_next > 0 else x0
    return x

"""DPM-Solver++: exponential integrators of the clean prediction, without a Brownian path. Source: Lu et al. 2022b."""

from __future__ import annotations

import torch
from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun, ancestral_split, flow_ancestral_split, half_log_snr, sigma_of


def dpmpp_2m(run: SamplerRun, x: Tensor) -> Tensor:
    """DPM-Solver++(2M): x0 extrapolated from this step and the last. Source: Lu et al. 2022b, algorithm 2."""
    last_x0: Tensor | None = None
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        h = _h(sigma, sigma_next)
        guess = x0
        if last_x0 is not None:
            r = _h(run.sigmas[i - 1], sigma) / h
            guess = (1 + 1 / (2 * r)) * x0 - (1 / (2 * r)) * last_x0
        x = (sigma_next / sigma) * x - (-h).expm1() * guess
        last_x0 = x0
    return x


def dpmpp_2m_cfg_pp(run: SamplerRun, x: Tensor) -> Tensor:
    """DPM-Solver++(2M) under CFG++: the direction comes from the negative prompt. Source: Chung et al. 2024."""
    last_negative_x0: Tensor | None = None
    for i, sigma, sigma_next in run.steps():
        x0, negative_x0 = run.denoise_pair(x, sigma)
        run.on_step(i, x, x0)
        h = _h(sigma, sigma_next)
        mixed = -torch.exp(-h) * negative_x0
        if last_negative_x0 is not None and sigma_next > 0:
            r = _h(run.sigmas[i - 1], sigma) / h
            mixed = mixed - torch.expm1(-h) * (1 / (2 * r)) * (x0 - last_negative_x0)
        x = x0 + mixed + torch.exp(-h) * x
        last_negative_x0 = negative_x0
    return x


def dpmpp_2s_ancestral(run: SamplerRun, x: Tensor) -> Tensor:
    """DPM-Solver++(2S) to a lower level, then fresh noise. Source: Lu et al. 2022b, algorithm 1, with r = 1/2."""
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        down, scale, added = _split(run, sigma, sigma_next)
        middle = _middle(run, sigma, down)
        half_way = (middle / sigma) * x + (_kept(run, sigma, middle)) * x0
        x = (down / sigma) * x + _kept(run, sigma, down) * run.denoise(half_way, middle)
        x = scale * x + run.noise(sigma, sigma_next) * added
    return x


def dpmpp_2s_ancestral_cfg_pp(run: SamplerRun, x: Tensor) -> Tensor:
    """`dpmpp_2s_ancestral` under CFG++, in the variance-exploding form for every model. Source: Chung et al. 2024.

    x is moved by guidance minus the latest negative prediction before each of the two half steps.
    """
    for i, sigma, sigma_next in run.steps():
        x0, negative_x0 = run.denoise_pair(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        down, up = ancestral_split(sigma, sigma_next)
        middle = (sigma.log() + 0.5 * _h(sigma, down).neg()).exp()
        half_way = (middle / sigma) * (x + (x0 - negative_x0)) + (1 - middle / sigma) * x0
        x0_middle, negative_x0 = run.denoise_pair(half_way, middle)
        x = (down / sigma) * (x + (x0 - negative_x0)) + (1 - down / sigma) * x0_middle
        x = x + run.noise(sigma, sigma_next) * up
    return x


def _h(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The step in t = -log sigma."""
    return sigma_next.log().neg() - sigma.log().neg()


def _split(run: SamplerRun, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(down, scale, added): step to `down`, then x = scale x + added noise."""
    if run.is_flow:
        return flow_ancestral_split(sigma, sigma_next)
    down, up = ancestral_split(sigma, sigma_next)
    return down, torch.ones(()), up


def _middle(run: SamplerRun, sigma: Tensor, down: Tensor) -> Tensor:
    """The sigma half way in half log signal-to-noise ratio; a flow at 1 has none and goes to 0.9999."""
    if run.is_flow and sigma == 1.0:
        return torch.tensor(0.9999)
    start = half_log_snr(run, sigma)
    return sigma_of(run, start + 0.5 * (half_log_snr(run, down) - start))


def _kept(run: SamplerRun, sigma: Tensor, target: Tensor) -> Tensor:
    """What of x0 enters on the way to `target`: 1 - target / sigma, in both forms."""
    return 1 - target / sigma

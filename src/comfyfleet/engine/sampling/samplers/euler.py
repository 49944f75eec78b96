"""Samplers built on Euler's and Heun's steps, with their ancestral (stochastic) and CFG++ forms."""

from __future__ import annotations

from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun, ancestral_split, flow_ancestral_split, half_log_snr


def euler(run: SamplerRun, x: Tensor) -> Tensor:
    """x += (x - x0) / sigma * (sigma_next - sigma). Source: Karras et al. 2022, algorithm 2 without churn.

    DDIM with eta 0 is the same step in other variables (Song et al. 2021).
    """
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        x = x + (x - x0) / sigma * (sigma_next - sigma)
    return x


def euler_ancestral(run: SamplerRun, x: Tensor) -> Tensor:
    """Euler's step to a lower level than wanted, then fresh noise up to it. Source: Song et al. 2021, eq. 12 and 16."""
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        if run.is_flow:
            down, scale, renoise = flow_ancestral_split(sigma, sigma_next)
            stepped = (down / sigma) * x + (1 - down / sigma) * x0
            x = scale * stepped + run.noise(sigma, sigma_next) * renoise
        else:
            down, up = ancestral_split(sigma, sigma_next)
            x = x + (x - x0) / sigma * (down - sigma) + run.noise(sigma, sigma_next) * up
    return x


def euler_cfg_pp(run: SamplerRun, x: Tensor) -> Tensor:
    """Euler under CFG++: the guided x0, re-noised along the negative prompt's direction.

    Source: Chung et al. 2024 (CFG++), algorithm 2, generalised to flows by alpha = 1 - sigma.
    """
    for i, sigma, sigma_next in run.steps():
        x0, negative_x0 = run.denoise_pair(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        alpha, alpha_next = _alpha(run, sigma), _alpha(run, sigma_next)
        x = alpha_next * x0 + sigma_next * ((x - alpha * negative_x0) / sigma)
    return x


def euler_ancestral_cfg_pp(run: SamplerRun, x: Tensor) -> Tensor:
    """`euler_cfg_pp` with an ancestral split of the next level, in sigma / alpha. Source: as there."""
    for i, sigma, sigma_next in run.steps():
        x0, negative_x0 = run.denoise_pair(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        alpha, alpha_next = _alpha(run, sigma), _alpha(run, sigma_next)
        down, up = ancestral_split(sigma / alpha, sigma_next / alpha_next)
        direction = (x - alpha * negative_x0) / sigma
        x = alpha_next * x0 + alpha_next * down * direction + alpha_next * run.noise(sigma, sigma_next) * up
    return x


def heun(run: SamplerRun, x: Tensor) -> Tensor:
    """Euler's step, corrected by the mean of the slopes at both its ends. Source: Karras et al. 2022, algorithm 2."""
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        slope = (x - x0) / sigma
        step = sigma_next - sigma
        if sigma_next == 0:
            return x + slope * step
        ahead = x + slope * step
        slope_ahead = (ahead - run.denoise(ahead, sigma_next)) / sigma_next
        x = x + (slope + slope_ahead) / 2 * step
    return x


def heunpp2(run: SamplerRun, x: Tensor) -> Tensor:
    """Heun++: up to two slopes ahead, weighted by their sigma over the first sigma.

    Source: Carzit, sd-webui-samplers-scheduler (MIT). Two slopes on the last step but one, one on the last.
    """
    first, last = run.sigmas[0], run.sigmas[-1]
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        slope = (x - x0) / sigma
        step = sigma_next - sigma
        if sigma_next == last:
            x = x + slope * step
            continue
        ahead = x + slope * step
        slope_2 = (ahead - run.denoise(ahead, sigma_next)) / sigma_next
        after = run.sigmas[i + 2]
        if after == last:
            share_2 = sigma_next / (2 * first)
            x = x + (slope * (1 - share_2) + slope_2 * share_2) * step
            continue
        further = ahead + slope_2 * (after - sigma_next)
        slope_3 = (further - run.denoise(further, after)) / after
        share_2, share_3 = sigma_next / (3 * first), after / (3 * first)
        x = x + ((1 - share_2 - share_3) * slope + share_2 * slope_2 + share_3 * slope_3) * step
    return x


def _alpha(run: SamplerRun, sigma: Tensor) -> Tensor:
    return sigma * half_log_snr(run, sigma).exp()

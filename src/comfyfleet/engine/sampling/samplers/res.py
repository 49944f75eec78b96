"""RES multistep and gradient estimation, with their ancestral and CFG++ forms."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun, ancestral_split


def _res_multistep(run: SamplerRun, x: Tensor, *, ancestral: bool, cfg_pp: bool) -> Tensor:
    """Second-order exponential multistep in t = -log sigma. Source: Zhang et al. 2023 (RES, arXiv 2308.02157), eq. 13.

    CFG++ takes its direction from the negative prompt and adds the guidance apart.
    """
    last: Tensor | None = None
    last_down = run.sigmas[0]
    for i, sigma, sigma_next in run.steps():
        x0, base = run.denoise_pair(x, sigma) if cfg_pp else (run.denoise(x, sigma),) * 2
        run.on_step(i, x, x0)
        down, up = ancestral_split(sigma, sigma_next) if ancestral else (sigma_next, torch.zeros(()))
        if down == 0 or last is None:
            x = x0 + (x - base) / sigma * down if cfg_pp else x + (x - x0) / sigma * (down - sigma)
        else:
            h = sigma.log() - down.log()
            c2 = (last_down.log() - run.sigmas[i - 1].log()) / h
            phi_1 = torch.expm1(-h) / -h
            phi_2 = (phi_1 - 1.0) / -h
            b1 = torch.nan_to_num(phi_1 - phi_2 / c2, nan=0.0)
            b2 = torch.nan_to_num(phi_2 / c2, nan=0.0)
            if cfg_pp:
                x = x + (x0 - base)
            x = h.neg().exp() * x + h * (b1 * base + b2 * last)
        if ancestral and sigma_next > 0:
            x = x + run.noise(sigma, sigma_next) * up
        last, last_down = base, down
    return x


res_multistep = partial(_res_multistep, ancestral=False, cfg_pp=False)
res_multistep_cfg_pp = partial(_res_multistep, ancestral=False, cfg_pp=True)
res_multistep_ancestral = partial(_res_multistep, ancestral=True, cfg_pp=False)
res_multistep_ancestral_cfg_pp = partial(_res_multistep, ancestral=True, cfg_pp=True)


def _gradient_estimation(run: SamplerRun, x: Tensor, *, cfg_pp: bool, gamma: float = 2.0) -> Tensor:
    """Euler with the slope over-relaxed by its last change. Source: Permenter & Yuan 2024, algorithm 2, gamma = 2."""
    last_slope: Tensor | None = None
    for i, sigma, sigma_next in run.steps():
        x0, base = run.denoise_pair(x, sigma) if cfg_pp else (run.denoise(x, sigma),) * 2
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        slope = (x - base) / sigma
        step = sigma_next - sigma
        x = x0 + slope * sigma_next if cfg_pp else x + slope * step
        if last_slope is not None:
            x = x + (gamma - 1) * (slope - last_slope) * step
        last_slope = slope
    return x


gradient_estimation = partial(_gradient_estimation, cfg_pp=False)
gradient_estimation_cfg_pp = partial(_gradient_estimation, cfg_pp=True)

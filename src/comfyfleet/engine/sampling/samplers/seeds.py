"""SEEDS: stochastic explicit exponential solvers without derivatives. Source: Gonzalez et al. 2023 (arXiv 2305.14267).

Time is lambda, the half log signal-to-noise ratio; each stage adds the noise of its own stretch of time, and the noise
of earlier stretches fades on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comfyfleet.engine.sampling.noise import NoiseSource
from comfyfleet.engine.sampling.run import SamplerRun, half_log_snr, sigma_of, starting_below_one


def seeds_2(run: SamplerRun, x: Tensor, r: float = 0.5) -> Tensor:
    """SEEDS-2 in data prediction: one stage at r, whose x0 is weighted 1 / (2r). Source: algorithm 2."""
    run = starting_below_one(run)
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        start, end = half_log_snr(run, sigma), half_log_snr(run, sigma_next)
        h = end - start
        middle = torch.lerp(start, end, r)
        sigma_middle = sigma_of(run, middle)

        grown = _grown(None, run.noise, r * h, sigma, sigma_middle)
        there = _carried(x, sigma, sigma_middle, r * h) - sigma_middle * middle.exp() * _phi_1(r * h) * x0
        x0_there = run.denoise(there + sigma_middle * grown, sigma_middle)

        grown = _grown(grown, run.noise, (1 - r) * h, sigma_middle, sigma_next)
        mixed = torch.lerp(x0, x0_there, 1 / (2 * r))
        x = _carried(x, sigma, sigma_next, h) - sigma_next * end.exp() * _phi_1(h) * mixed + sigma_next * grown
    return x


def seeds_3(run: SamplerRun, x: Tensor, r1: float = 1.0 / 3, r2: float = 2.0 / 3) -> Tensor:
    """SEEDS-3 in data prediction: stages at r1 and r2. Source: algorithm 3."""
    run = starting_below_one(run)
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        start, end = half_log_snr(run, sigma), half_log_snr(run, sigma_next)
        h = end - start
        time_1, time_2 = torch.lerp(start, end, r1), torch.lerp(start, end, r2)
        sigma_1, sigma_2 = sigma_of(run, time_1), sigma_of(run, time_2)

        grown = _grown(None, run.noise, r1 * h, sigma, sigma_1)
        there = _carried(x, sigma, sigma_1, r1 * h) - sigma_1 * time_1.exp() * _phi_1(r1 * h) * x0
        x0_1 = run.denoise(there + sigma_1 * grown, sigma_1)

        grown = _grown(grown, run.noise, (r2 - r1) * h, sigma_1, sigma_2)
        share = r2 / r1 * _phi_2(r2 * h)
        mixed = (_phi_1(r2 * h) - share) * x0 + share * x0_1
        there = _carried(x, sigma, sigma_2, r2 * h) - sigma_2 * time_2.exp() * mixed
        x0_2 = run.denoise(there + sigma_2 * grown, sigma_2)

        grown = _grown(grown, run.noise, (1 - r2) * h, sigma_2, sigma_next)
        share = _phi_2(h) / r2
        mixed = (_phi_1(h) - share) * x0 + share * x0_2
        x = _carried(x, sigma, sigma_next, h) - sigma_next * end.exp() * mixed + sigma_next * grown
    return x


def _carried(x: Tensor, sigma: Tensor, target: Tensor, h: Tensor) -> Tensor:
    """x's own part at `target`, a time h later: eta 1 damps it by exp(-h) beside the change of sigma."""
    return target / sigma * (-h).exp() * x


def _grown(before: Tensor | None, noise: NoiseSource, h: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    """The noise gathered so far, faded over h, plus that of this stretch."""
    fresh = (-2 * h).expm1().neg().sqrt() * noise(sigma, target)
    return fresh if before is None else before * (-h).exp() + fresh


def _phi_1(h: Tensor) -> Tensor:
    """h phi_1(h) at -2h: the SDE's data part contracts twice as fast as time."""
    return torch.expm1(-2 * h)


def _phi_2(h: Tensor) -> Tensor:
    """h phi_2(h) at -2h."""
    return (torch.expm1(-2 * h) + 2 * h) / (-2 * h)

"""ER-SDE-Solver-3: an extended reverse-time SDE with a free noise schedule. ACE-Step's usual sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun, half_log_snr, starting_below_one

INTEGRATION_POINTS = 200


def noise_scale(level: Tensor) -> Tensor:
    """f(l) = l (exp(l^0.3) + 10), how strongly noise is kept at level l = sigma / alpha (Cui et al. 2023, eq. 29)."""
    return level * ((level**0.3).exp() + 10.0)


def er_sde(run: SamplerRun, x: Tensor) -> Tensor:
    """VP ER-SDE-Solver-3. Source: Cui et al. 2023 (arXiv 2309.06169), algorithm 3.

    An Euler step, then corrections with the first and second divided difference of x0 in the level, then noise.
    """
    run = starting_below_one(run)
    weights = _weights(run)
    last_x0: Tensor | None = None
    last_slope: Tensor | None = None

    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        step = weights[i]
        x = step.kept * x + step.taken * x0
        if last_x0 is not None:
            slope = (x0 - last_x0) / (step.level - weights[i - 1].level)
            x = x + step.slope * slope
            if last_slope is not None:
                x = x + step.curvature * ((slope - last_slope) / ((step.level - weights[i - 2].level) / 2))
            last_slope = slope
        x = x + step.added * run.noise(sigma, sigma_next)
        last_x0 = x0
    return x


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One step's level l_s and what multiplies x, x0, their divided differences, and the noise."""

    level: float
    kept: float
    taken: float
    slope: float
    curvature: float
    added: float


def _weights(run: SamplerRun) -> list[_Step]:
    """All steps at once: they follow from the sigmas, and the host need not compute them while a GPU waits.

    With r = f(l_t) / f(l_s): x by alpha_t / alpha_s r, x0 by alpha_t (1 - r); the differences' integrals of 1 / f and
    (l - l_s) / f are left Riemann sums over 200 points; noise of variance alpha_t^2 (l_t^2 - l_s^2 r^2).
    """
    levels = half_log_snr(run, run.sigmas).neg().exp()
    alphas = run.sigmas / levels
    level, level_next, alpha, alpha_next = levels[:-1], levels[1:], alphas[:-1], alphas[1:]
    scale_next = noise_scale(level_next)
    r = scale_next / noise_scale(level)
    step = level_next - level
    width = -step / INTEGRATION_POINTS
    positions = level_next[:, None] + torch.arange(INTEGRATION_POINTS, dtype=torch.float32) * width[:, None]
    scales = noise_scale(positions)
    area = (1 / scales).sum(dim=1) * width
    moment = ((positions - level[:, None]) / scales).sum(dim=1) * width
    columns = (
        level,
        alpha_next / alpha * r,
        alpha_next * (1 - r),
        alpha_next * (step + area * scale_next),
        alpha_next * (step**2 / 2 + moment * scale_next),
        alpha_next * (level_next**2 - level**2 * r**2).sqrt().nan_to_num(nan=0.0),
    )
    return [
        _Step(level=row[0], kept=row[1], taken=row[2], slope=row[3], curvature=row[4], added=row[5])
        for row in torch.stack(columns, dim=1).tolist()
    ]

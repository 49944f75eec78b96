"""ER-SDE-Solver-3: an extended reverse-time SDE with a free noise schedule. ACE-Step's usual sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from comfyfleet.engine.sampling.noise import device_noise
from comfyfleet.engine.sampling.run import SamplerRun, half_log_snr, starting_below_one

INTEGRATION_POINTS = 200


def noise_scale(level: Tensor) -> Tensor:
    """f(l) = l (exp(l^0.3) + 10), how strongly noise is kept at level l = sigma / alpha (Cui et al. 2023, eq. 29)."""
    return level * ((level**0.3).exp() + 10.0)


def er_sde(run: SamplerRun, x: Tensor) -> Tensor:
    """VP ER-SDE-Solver-3. Source: Cui et al. 2023 (arXiv 2309.06169), algorithm 3.

    With l = sigma / alpha, r = f(l_t) / f(l_s): an Euler step, then corrections with the first and second divided
    difference of x0, whose integrals are left Riemann sums, then noise of variance alpha_t^2 (l_t^2 - l_s^2 r^2).
    """
    noise = device_noise(x, run.seed)
    run = starting_below_one(run)
    levels = half_log_snr(run, run.sigmas).neg().exp()
    points = torch.arange(INTEGRATION_POINTS, dtype=torch.float32)
    last_x0: Tensor | None = None
    last_slope: Tensor | None = None

    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0

        level, level_next = levels[i], levels[i + 1]
        alpha, alpha_next = sigma / level, sigma_next / level_next
        scale_next = noise_scale(level_next)
        r = scale_next / noise_scale(level)
        x = (alpha_next / alpha) * r * x + alpha_next * (1 - r) * x0

        if last_x0 is not None:
            step = level_next - level
            width = -step / INTEGRATION_POINTS
            positions = level_next + points * width
            scales = noise_scale(positions)
            area = torch.sum(1 / scales) * width
            slope = (x0 - last_x0) / (level - levels[i - 1])
            x = x + alpha_next * (step + area * scale_next) * slope
            if last_slope is not None:
                moment = torch.sum((positions - level) / scales) * width
                curvature = (slope - last_slope) / ((level - levels[i - 2]) / 2)
                x = x + alpha_next * (step**2 / 2 + moment * scale_next) * curvature
            last_slope = slope

        added = (level_next**2 - level**2 * r**2).sqrt().nan_to_num(nan=0.0)
        x = x + alpha_next * noise(sigma, sigma_next) * added
        last_x0 = x0
    return x

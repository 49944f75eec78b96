"""DPM-Solver: exponential integrators of the noise prediction, in time t = -log sigma. Source: Lu et al. 2022."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun, ancestral_split, flow_ancestral_split


def dpm_2(run: SamplerRun, x: Tensor) -> Tensor:
    """The slope at the geometric middle of the step is used for all of it. Source: Karras et al. 2022, DPM-Solver-2."""
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        x = _midpoint_step(run, x, x0, sigma, sigma_next)
    return x


def dpm_2_ancestral(run: SamplerRun, x: Tensor) -> Tensor:
    """`dpm_2` to a lower level, then fresh noise up to the next sigma."""
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return _midpoint_step(run, x, x0, sigma, sigma_next)
        if run.is_flow:
            down, scale, renoise = flow_ancestral_split(sigma, sigma_next)
            x = scale * _midpoint_step(run, x, x0, sigma, down) + run.noise(sigma, sigma_next) * renoise
        else:
            down, up = ancestral_split(sigma, sigma_next)
            x = _midpoint_step(run, x, x0, sigma, down) + run.noise(sigma, sigma_next) * up
    return x


def _midpoint_step(run: SamplerRun, x: Tensor, x0: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    slope = (x - x0) / sigma
    if target == 0:
        return x + slope * (target - sigma)
    middle = sigma.log().lerp(target.log(), 0.5).exp()
    half_way = x + slope * (middle - sigma)
    return x + (half_way - run.denoise(half_way, middle)) / middle * (target - sigma)


def dpm_fast(run: SamplerRun, x: Tensor) -> Tensor:
    """DPM-Solver-fast: third-order steps, equally spaced in t, with as many network calls as sigmas were asked for.

    Source: Lu et al. 2022, section 3.4 and appendix D.3. Ends at the last positive sigma.
    """
    if len(run.sigmas) <= 1:
        return x
    calls = len(run.sigmas) - 1
    start, end = _time_range(run)
    blocks = math.floor(calls / 3) + 1
    times = torch.linspace(start, end, blocks + 1)
    orders = [3] * (blocks - 2) + [2, 1] if calls % 3 == 0 else [3] * (blocks - 1) + [calls % 3]
    for i, order in enumerate(orders):
        eps = _eps(run, x, times[i])
        run.on_step(i, x, x - _sigma(times[i]) * eps)
        x = _singlestep(run, x, times[i], times[i + 1], eps, order)[-1]
    return x


def dpm_adaptive(
    run: SamplerRun, x: Tensor, relative: float = 0.05, absolute: float = 0.0078, first_step: float = 0.05
) -> Tensor:
    """DPM-Solver-23: steps as long as the second- and third-order answers agree. The sigmas give the range only.

    Source: Lu et al. 2022, appendix C, with the step controller of k-diffusion: a step is accepted when the length
    that its error suggests is at least 0.81 of its own.
    """
    if len(run.sigmas) <= 1:
        return x
    t, end = _time_range(run)
    length = first_step
    last_low = x
    eps: Tensor | None = None
    step = 0
    while t < end - 1e-5:
        target = torch.minimum(end, t + length)
        if eps is None:  # after a rejected step x is the same, and so is its prediction
            eps = _eps(run, x, t)
        x0 = x - _sigma(t) * eps
        low, high = _singlestep(run, x, t, target, eps, 3)
        allowed = torch.clamp(relative * torch.maximum(low.abs(), last_low.abs()), min=absolute)
        error = float(torch.linalg.norm((low - high) / allowed) / x.numel() ** 0.5)
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        if factor >= 0.81:
            last_low, x, t, eps = low, high, target, None
        length *= factor
        run.on_step(step, x, x0)
        step += 1
    return x


def _singlestep(run: SamplerRun, x: Tensor, t: Tensor, target: Tensor, eps: Tensor, order: int) -> tuple[Tensor, ...]:
    """DPM-Solver-1, -2 or -3 from t to target; for order 3, the second-order answer by the same calls comes first.

    Source: Lu et al. 2022, algorithms 1 and 2, with r1 = 1/2 for order 2, and r1 = 1/3, r2 = 2/3 for order 3.
    """
    h = target - t
    sigma_target = _sigma(target)
    first = x - sigma_target * h.expm1() * eps
    if order == 1:
        return (first,)
    r1, r2 = (1 / 2, 0.0) if order == 2 else (1 / 3, 2 / 3)
    s1 = t + r1 * h
    eps_1 = _eps(run, x - _sigma(s1) * (r1 * h).expm1() * eps, s1)
    second = first - sigma_target / (2 * r1) * h.expm1() * (eps_1 - eps)
    if order == 2:
        return (second,)
    s2 = t + r2 * h
    sigma_2, grown = _sigma(s2), (r2 * h).expm1()
    there = x - sigma_2 * grown * eps - sigma_2 * (r2 / r1) * (grown / (r2 * h) - 1) * (eps_1 - eps)
    eps_2 = _eps(run, there, s2)
    return second, first - sigma_target / r2 * (h.expm1() / h - 1) * (eps_2 - eps)


def _eps(run: SamplerRun, x: Tensor, t: Tensor) -> Tensor:
    sigma = _sigma(t)
    return (x - run.denoise(x, sigma)) / sigma


def _sigma(t: Tensor) -> Tensor:
    return t.neg().exp()


def _time_range(run: SamplerRun) -> tuple[Tensor, Tensor]:
    last = run.sigmas[-1] if run.sigmas[-1] > 0 else run.sigmas[-2]
    return run.sigmas[0].log().neg(), last.log().neg()

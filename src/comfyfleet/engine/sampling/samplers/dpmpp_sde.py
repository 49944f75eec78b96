"""DPM-Solver++ for the reverse SDE; its noise is one Brownian path, so more steps refine the same picture.

Time is lambda, the half log signal-to-noise ratio; alpha = sigma exp(lambda). Source: Lu et al. 2022b, appendix B.5.
The `_gpu` names draw the path on x's device instead of the CPU.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from comfyfleet.engine.sampling.noise import brownian_noise
from comfyfleet.engine.sampling.run import SamplerRun, ancestral_split, half_log_snr, sigma_of, starting_below_one


def _sde(run: SamplerRun, x: Tensor, *, on_cpu: bool) -> Tensor:
    """SDE-DPM-Solver++(2S) with its midpoint at r = 1/2."""
    noise = brownian_noise(x, run.sigmas, run.seed, on_cpu=on_cpu)
    run = starting_below_one(run)
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        start, end = half_log_snr(run, sigma), half_log_snr(run, sigma_next)
        middle = start + 0.5 * (end - start)
        sigma_middle = sigma_of(run, middle)

        half_way, added = _ancestral_step(x, x0, sigma, start, sigma_middle, middle)
        half_way = half_way + noise(sigma, sigma_middle) * added
        x0 = run.denoise(half_way, sigma_middle)

        x, added = _ancestral_step(x, x0, sigma, start, sigma_next, end)
        x = x + noise(sigma, sigma_next) * added
    return x


def _ancestral_step(
    x: Tensor, x0: Tensor, sigma: Tensor, start: Tensor, sigma_next: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """x moved below sigma_next by x0, and the noise to add after. start, end: lambda of the two sigmas."""
    alpha, alpha_next = sigma * start.exp(), sigma_next * end.exp()
    down, up = ancestral_split(start.neg().exp(), end.neg().exp())
    h = down.log().neg() - start
    return (alpha_next / alpha) * (-h).exp() * x - alpha_next * (-h).expm1() * x0, alpha_next * up


def _2m_sde(run: SamplerRun, x: Tensor, *, on_cpu: bool, heun: bool) -> Tensor:
    """SDE-DPM-Solver++(2M): a second-order term from the last x0, by the midpoint or the Heun rule."""
    noise = brownian_noise(x, run.sigmas, run.seed, on_cpu=on_cpu)
    run = starting_below_one(run)
    last_x0: Tensor | None = None
    last_h: Tensor | None = None
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        h, alpha_next = _step_and_alpha(run, sigma, sigma_next)
        x = sigma_next / sigma * (-h).exp() * x + alpha_next * (-2 * h).expm1().neg() * x0
        if last_x0 is not None and last_h is not None:
            slope = (x0 - last_x0) * (h / last_h)
            if heun:
                x = x + alpha_next * ((-2 * h).expm1().neg() / (-2 * h) + 1) * slope
            else:
                x = x + 0.5 * alpha_next * (-2 * h).expm1().neg() * slope
        x = x + noise(sigma, sigma_next) * sigma_next * (-2 * h).expm1().neg().sqrt()
        last_x0, last_h = x0, h
    return x


def _3m_sde(run: SamplerRun, x: Tensor, *, on_cpu: bool) -> Tensor:
    """SDE-DPM-Solver++(3M): first and second divided differences of the last x0s."""
    noise = brownian_noise(x, run.sigmas, run.seed, on_cpu=on_cpu)
    run = starting_below_one(run)
    past: list[tuple[Tensor, Tensor]] = []  # (x0, its step), the latest first
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        h, alpha_next = _step_and_alpha(run, sigma, sigma_next)
        h_2 = h * 2  # eta 1: the SDE contracts twice as fast as the ODE
        x = sigma_next / sigma * (-h).exp() * x + alpha_next * (-h_2).expm1().neg() * x0
        phi_2 = (-h_2).expm1() / h_2 + 1
        if len(past) == 2:
            (x0_1, h_1), (x0_2, h_2_ago) = past
            r0, r1 = h_1 / h, h_2_ago / h
            slope_0, slope_1 = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
            curvature = (slope_0 - slope_1) / (r0 + r1)
            phi_3 = phi_2 / h_2 - 0.5
            x = x + (alpha_next * phi_2) * (slope_0 + curvature * r0) - (alpha_next * phi_3) * curvature
        elif len(past) == 1:
            x = x + (alpha_next * phi_2) * ((x0 - past[0][0]) / (past[0][1] / h))
        x = x + noise(sigma, sigma_next) * sigma_next * (-2 * h).expm1().neg().sqrt()
        past = [(x0, h), *past[:1]]
    return x


def _step_and_alpha(run: SamplerRun, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    end = half_log_snr(run, sigma_next)
    return end - half_log_snr(run, sigma), sigma_next * end.exp()


dpmpp_sde = partial(_sde, on_cpu=True)
dpmpp_sde_gpu = partial(_sde, on_cpu=False)
dpmpp_2m_sde = partial(_2m_sde, on_cpu=True, heun=False)
dpmpp_2m_sde_gpu = partial(_2m_sde, on_cpu=False, heun=False)
dpmpp_2m_sde_heun = partial(_2m_sde, on_cpu=True, heun=True)
dpmpp_2m_sde_heun_gpu = partial(_2m_sde, on_cpu=False, heun=True)
dpmpp_3m_sde = partial(_3m_sde, on_cpu=True)
dpmpp_3m_sde_gpu = partial(_3m_sde, on_cpu=False)

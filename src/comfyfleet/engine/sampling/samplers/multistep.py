"""Adams-Bashforth samplers: the slope (x - x0) / sigma extrapolated from the last few steps."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun


def lms(run: SamplerRun, x: Tensor, order: int = 4) -> Tensor:
    """Linear multistep: the polynomial through the last slopes, integrated over the step. Source: Liu et al. 2022."""
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        shares = _lagrange_integrals(
            run.sigmas[i + 1 - len(slopes) : i + 1].flip(0).double().numpy(), float(sigma_next)
        )
        x = x + sum(share * slope for share, slope in zip(shares, slopes, strict=True))
    return x


def _lagrange_integrals(nodes: np.ndarray, end: float) -> list[float]:
    """For each node, the integral of its Lagrange polynomial from nodes[0] to `end`."""
    integrals = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        basis = np.polynomial.Polynomial([1.0])
        for other in others:
            basis = basis * np.polynomial.Polynomial([-other, 1.0]) / (node - other)
        area = basis.integ()
        integrals.append(float(area(end) - area(nodes[0])))
    return integrals


# Adams-Bashforth weights on equal steps, the latest slope first.
_ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm(run: SamplerRun, x: Tensor) -> Tensor:
    """Improved pseudo linear multistep: Adams-Bashforth weights as if the steps were equal.

    Source: Zhang & Chen 2022 (DEIS), section 3.3.
    """
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        slopes = [(x - x0) / sigma, *slopes[:3]]
        mean = sum(weight * slope for weight, slope in zip(_ADAMS[len(slopes)], slopes, strict=True))
        x = x + (sigma_next - sigma) * mean
    return x


def ipndm_v(run: SamplerRun, x: Tensor) -> Tensor:
    """`ipndm` with weights for unequal steps. Source: Zhou et al. 2024 (diff-sampler), iPNDM_v."""
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        if sigma_next == 0:
            return x0
        slopes = [(x - x0) / sigma, *slopes[:3]]
        lengths = [run.sigmas[i + 1 - k] - run.sigmas[i - k] for k in range(len(slopes))]
        mean = sum(weight * slope for weight, slope in zip(_unequal_weights(lengths), slopes, strict=True))
        x = x + (sigma_next - sigma) * mean
    return x


def _unequal_weights(lengths: list[Tensor]) -> list[Tensor]:
    """Weights of the latest slopes for step lengths h, h1, h2, h3 (this step first), as iPNDM_v has them."""
    h = lengths[0]
    if len(lengths) == 1:
        return [torch.ones(())]
    h1 = lengths[1]
    weights = [(2 + h / h1) / 2, -(h / h1) / 2]
    if len(lengths) == 2:
        return weights
    h2 = lengths[2]
    third = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
    ratio = h1 / h2
    weights = [weights[0] + third, weights[1] - (1 + ratio) * third, third * ratio]
    if len(lengths) == 3:
        return weights
    h3 = lengths[3]
    fourth = ((1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))) * (
        h * (h + h1) * (h + h1 + h2)
    )
    fourth = fourth / (h1 * (h1 + h2) * (h1 + h2 + h3))
    outer = h1 * (h1 + h2) / (h2 * (h2 + h3))
    return [
        weights[0] + fourth,
        weights[1] - (1 + ratio + outer) * fourth,
        weights[2] + (ratio + outer * (1 + h2 / h3)) * fourth,
        -fourth * outer * ratio,
    ]


def deis(run: SamplerRun, x: Tensor, order: int = 3) -> Tensor:
    """DEIS, tAB form: Lagrange polynomials in the variance-preserving time. Source: Zhang & Chen 2022, eq. 15."""
    times, beta_min, beta_slope = _vp_times(run.sigmas)
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        if len(slopes) == 1 or sigma_next <= 0:
            x = x + (sigma_next - sigma) * slopes[0]
            continue
        nodes = times[i + 1 - len(slopes) : i + 1].flip(0)
        shares = _deis_integrals(nodes, times[i + 1], beta_min, beta_slope)
        x = x + sum(share * slope for share, slope in zip(shares, slopes, strict=True))
    return x


def _vp_times(
    sigmas: Tensor, first_time: float = 1e-3, low: float = 0.002, high: float = 80.0
) -> tuple[Tensor, float, float]:
    """Sigmas as times of the linear variance-preserving SDE through (first_time, low) and (1, high).

    Source: Karras et al. 2022, table 1, VP column: sigma^2 + 1 = exp(slope t^2 / 2 + min t).
    """
    log_low, log_high = math.log(low**2 + 1), math.log(high**2 + 1)
    slope = 2 * (log_low / first_time - log_high) / (first_time - 1)
    minimum = log_high - 0.5 * slope
    return ((minimum**2 + 2 * slope * (sigmas**2 + 1).log()).sqrt() - minimum) / slope, minimum, slope


def _deis_integrals(
    nodes: Tensor, end: Tensor, beta_min: float, beta_slope: float, points: int = 10_000
) -> list[Tensor]:
    """For each node, the integral from nodes[0] to `end` of its Lagrange polynomial times d sigma / dt."""
    times = torch.linspace(nodes[0], end, points)
    width = (end - nodes[0]) / points
    kept = torch.exp(-0.5 * times**2 * beta_slope - times * beta_min)
    rate = 0.5 * (beta_slope * times + beta_min) / torch.sqrt(kept * (1 - kept))
    integrals = []
    for j, node in enumerate(nodes):
        basis = torch.ones_like(times)
        for k, other in enumerate(nodes):
            if k != j:
                basis = basis * (times - other) / (node - other)
        integrals.append(torch.sum(rate * basis) * width)
    return integrals

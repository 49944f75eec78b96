"""UniPC: a unified predictor-corrector of any order. Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 to 8.

Works in the variance-preserving space x / sqrt(1 + sigma^2), multistep, of order 3, predicting x0.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun

ORDER = 3
LAST_SIGMA = 0.001  # stands for 0, which has no logarithm


def _uni_pc(run: SamplerRun, x: Tensor, *, exponential_b: bool) -> Tensor:
    """Order rises over the first steps and falls over the last; the last step is predicted only.

    `exponential_b`: B(h) = exp(h) - 1 (bh2) instead of h (bh1).
    """
    sigmas = run.sigmas.clone()
    if sigmas[-1] == 0:
        sigmas[-1] = LAST_SIGMA
    steps = len(sigmas) - 1
    order = min(ORDER, steps - 1)
    x = x / torch.sqrt(1.0 + sigmas[0] ** 2.0)
    past: list[tuple[Tensor, Tensor]] = []  # (sigma, x0), the latest last
    for i in range(steps):
        if i == 0:
            x0 = _predicted_x0(run, x, sigmas[0])
        else:
            this_order = min(i, order, steps + 1 - i)
            x, x0 = _step(run, x, past[-this_order:], sigmas[i], exponential_b=exponential_b, correct=True)
        run.on_step(i, x, x0)
        past = [*past[-(ORDER - 1) :], (sigmas[i], x0)]
    if order > 0:
        x, _ = _step(run, x, past[-1:], sigmas[-1], exponential_b=exponential_b, correct=False)
    x = x / _log_alpha(sigmas[-1]).exp()
    # A flow that ended just above 0 still has its signal scaled by 1 - sigma; the caller scales by the run's own last.
    return x * (1 - run.sigmas[-1]) / (1 - sigmas[-1]) if run.is_flow else x


uni_pc = partial(_uni_pc, exponential_b=False)
uni_pc_bh2 = partial(_uni_pc, exponential_b=True)


def _step(
    run: SamplerRun, x: Tensor, past: list[tuple[Tensor, Tensor]], sigma: Tensor, *, exponential_b: bool, correct: bool
) -> tuple[Tensor, Tensor]:
    """x at `sigma` from the past x0s (their number is the order), and the x0 there where it is corrected by it."""
    order = len(past)
    last_sigma, last_x0 = past[-1]
    h = _lambda(sigma) - _lambda(last_sigma)
    ratios = [(_lambda(earlier) - _lambda(last_sigma)) / h for earlier, _ in reversed(past[:-1])]
    slopes = [(x0 - last_x0) / ratio for (_, x0), ratio in zip(reversed(past[:-1]), ratios, strict=True)]
    grown = torch.expm1(-h)
    b = grown if exponential_b else -h
    matrix, targets = _order_conditions([*ratios, torch.ones(())], h, b)

    alpha = _log_alpha(sigma).exp()
    moved = _std(sigma) / _std(last_sigma) * x - alpha * grown * last_x0
    predicted = moved
    if slopes:
        shares = torch.tensor([0.5]) if order == 2 else torch.linalg.solve(matrix[:-1, :-1], targets[:-1])
        predicted = moved - alpha * b * sum(share * slope for share, slope in zip(shares, slopes, strict=True))
    if not correct:
        return predicted, last_x0

    x0 = _predicted_x0(run, predicted, sigma)
    shares = torch.tensor([0.5]) if order == 1 else torch.linalg.solve(matrix, targets)
    change = sum(share * slope for share, slope in zip(shares, [*slopes, x0 - last_x0], strict=True))
    return moved - alpha * b * change, x0


def _order_conditions(ratios: list[Tensor], h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(R, b) with R_k = ratios^(k-1) and b_k = k! h phi_(k+1)(h) / B(h), at -h. Source: theorem 3.1."""
    points = torch.stack(ratios)
    phi = torch.expm1(-h) / -h - 1
    factorial = 1
    rows, targets = [], []
    for k in range(1, len(ratios) + 1):
        rows.append(points ** (k - 1))
        targets.append(phi * factorial / b)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return torch.stack(rows), torch.stack(targets)


def _predicted_x0(run: SamplerRun, x: Tensor, sigma: Tensor) -> Tensor:
    """x0 by way of the noise prediction, whose rounding at small sigmas is part of the answer."""
    outside = x * (sigma**2 + 1.0) ** 0.5
    eps = (outside - run.denoise(outside, sigma)) / sigma
    return (x - _std(sigma) * eps) / _log_alpha(sigma).exp()


def _log_alpha(sigma: Tensor) -> Tensor:
    return 0.5 * torch.log(1 / (sigma * sigma + 1))


def _std(sigma: Tensor) -> Tensor:
    return torch.sqrt(1.0 - torch.exp(2.0 * _log_alpha(sigma)))


def _lambda(sigma: Tensor) -> Tensor:
    log_alpha = _log_alpha(sigma)
    return log_alpha - 0.5 * torch.log(1.0 - torch.exp(2.0 * log_alpha))

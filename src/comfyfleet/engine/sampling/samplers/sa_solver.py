"""SA-Solver: stochastic Adams predictor and corrector. Source: Xue et al. 2023 (arXiv 2309.05019), algorithm 1.

Time is lambda, the half log signal-to-noise ratio. The noise strength tau is 1 in the middle of the way (20 % to 80 %)
and 0 at its ends, as the authors advise.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun, half_log_snr, starting_below_one

PREDICTOR_ORDER = 3
CORRECTOR_ORDER = 4


def _sa_solver(run: SamplerRun, x: Tensor, *, evaluate_twice: bool) -> Tensor:
    """Predict, evaluate, correct; with `evaluate_twice` the corrected state is evaluated as well (PECE)."""
    if len(run.sigmas) <= 1:
        return x
    run = starting_below_one(run)
    sigmas, times = run.sigmas, half_log_snr(run, run.sigmas)
    first_noisy, last_noisy = run.table.percent_to_sigma(0.2), run.table.percent_to_sigma(0.8)
    ends_clean = float(sigmas[-1]) == 0.0
    predicted = x
    past: list[Tensor] = []  # x0 of the last steps, the latest last
    tau = 0.0
    added: Tensor | None = None

    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(predicted, sigma)
        run.on_step(i, predicted, x0)
        past = [*past[-(CORRECTOR_ORDER - 1) :], x0]

        predictor_order = min(PREDICTOR_ORDER, len(past))
        corrector_order = 0 if i == 0 or (sigma_next == 0 and not evaluate_twice) else min(CORRECTOR_ORDER, len(past))
        if ends_clean:  # lower orders near the end are steadier
            predictor_order = min(predictor_order, len(sigmas) - 2 - i)
            corrector_order = min(corrector_order, len(sigmas) - 1 - i)

        if corrector_order == 0:
            x = predicted
        else:
            nodes = times[i - corrector_order + 1 : i + 1]
            x = _adams(x, past[-corrector_order:], nodes, sigmas[i - 1 : i + 1], times[i - 1 : i + 1], tau)
            if added is not None:
                x = x + added
            if evaluate_twice:
                x0 = run.denoise(x, sigma)
                past[-1] = x0

        if sigma_next == 0:
            return x0
        tau = 1.0 if first_noisy >= float(sigma_next) >= last_noisy else 0.0
        nodes = times[i - predictor_order + 1 : i + 1]
        predicted = _adams(x, past[-predictor_order:], nodes, sigmas[i : i + 2], times[i : i + 2], tau)
        added = None
        if tau > 0:
            h = times[i + 1] - times[i]
            added = run.noise(sigma, sigma_next) * sigma_next * (-2 * tau**2 * h).expm1().neg().sqrt()
            predicted = predicted + added
    return x  # of a run cut before 0 ComfyUI gives the last corrected state, one step short


sa_solver = partial(_sa_solver, evaluate_twice=False)
sa_solver_pece = partial(_sa_solver, evaluate_twice=True)


def _adams(x: Tensor, past: list[Tensor], nodes: Tensor, sigmas: Tensor, times: Tensor, tau: float) -> Tensor:
    """One step over times[0] … times[1] with x0 interpolated through `nodes`. Source: eq. 14 (and 17, corrected)."""
    weights = _weights(nodes, times[0], times[1], tau) * (sigmas[1] * times[1].exp())
    moved = sigmas[1] / sigmas[0] * (-(tau**2) * (times[1] - times[0])).exp() * x
    return moved + sum(weight * x0 for weight, x0 in zip(weights, past, strict=True))


def _weights(nodes: Tensor, start: Tensor, end: Tensor, tau: float) -> Tensor:
    """For each node the integral of (1 + tau^2) exp((1 + tau^2)(u - end)) times its Lagrange polynomial, start to end.

    The integrals of the powers u^p follow by parts, I_p = [u^p e] - p / (1 + tau^2) I_(p-1); the Lagrange polynomials'
    from these by the Vandermonde system. Source: appendix B.
    """
    rate = 1 + tau**2
    order = len(nodes)
    powers = torch.arange(order, dtype=start.dtype)
    edges = end**powers - start**powers * (-rate * (end - start)).exp()
    depth = powers.unsqueeze(1) - powers.unsqueeze(0)
    log_factorial = (powers + 1).lgamma()
    chain = (log_factorial.unsqueeze(1) - log_factorial.unsqueeze(0) - depth * math.log(rate)).exp()
    integrals = (chain * torch.where(depth % 2 == 0, 1.0, -1.0)).tril() @ edges
    return torch.linalg.solve(torch.vander(nodes, order, increasing=True).T, integrals)

"""First-order samplers and their second-order corrections: Euler, Heun, and Euler's stochastic and CFG++ forms."""

from __future__ import annotations

from torch import Tensor

from comfyfleet.engine.sampling.run import SamplerRun


def euler(run: SamplerRun, x: Tensor) -> Tensor:
    """x += (x - x0) / sigma * (sigma_next - sigma). Source: Karras et al. 2022, algorithm 2 without churn.

    DDIM with eta 0 is the same step in other variables (Song et al. 2021).
    """
    for i, sigma, sigma_next in run.steps():
        x0 = run.denoise(x, sigma)
        run.on_step(i, x, x0)
        x = x + (x - x0) / sigma * (sigma_next - sigma)
    return x

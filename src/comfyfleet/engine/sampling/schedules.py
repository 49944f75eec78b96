"""Noise levels: a model's sigma table, and the schedulers that pick a falling list of sigmas from it.

Pure functions of numbers. A schedule is a float32 tensor (n + 1,) on the CPU, falling, and 0 at its end. The order of
operations matters where the last bit does: `simple` and `linear_quadratic` equal the reference bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from comfyfleet.engine.values import SigmaTable

TRAINING_STEPS = 1000


class FlowSigmas:
    """Rectified flow's table: sigma(t) = s t / (1 + (s - 1) t) for t = 1/1000 … 1, shifted by s.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2. The network is told `multiplier` x sigma.
    """

    def __init__(self, shift: float, multiplier: float = 1000.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift {shift} leaves no noise levels: it must be above 0")
        self.shift = shift
        self.multiplier = multiplier
        steps = torch.arange(1, TRAINING_STEPS + 1, 1) / TRAINING_STEPS
        self.sigmas: Tensor = self.sigma(steps * multiplier)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier

    def sigma(self, timestep: Tensor) -> Tensor:
        return self._shifted(timestep / self.multiplier)

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        return float(self._shifted(1.0 - percent))

    def _shifted(self, t: Tensor | float) -> Tensor | float:
        return t if self.shift == 1.0 else self.shift * t / (1 + (self.shift - 1) * t)


class ScaledLinearSigmas:
    """Stable Diffusion's table: sqrt(beta) rises linearly from sqrt(0.00085) to sqrt(0.012) over 1000 steps.

    sigma = sqrt((1 - a) / a) with a the running product of 1 - beta. Source: Rombach et al. 2022; Ho et al. 2020.
    """

    def __init__(self, first_beta: float = 0.00085, last_beta: float = 0.012) -> None:
        betas = torch.linspace(first_beta**0.5, last_beta**0.5, TRAINING_STEPS, dtype=torch.float64) ** 2
        kept = torch.cumprod(1.0 - betas, dim=0)
        sigmas = ((1 - kept) / kept) ** 0.5
        self.sigmas: Tensor = sigmas.float()
        self._log_sigmas: Tensor = sigmas.log().float()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The training step whose log sigma is nearest, as int64 of sigma's shape."""
        distance = (sigma.detach().cpu().log().reshape(-1) - self._log_sigmas[:, None]).abs()
        return distance.argmin(dim=0).view(sigma.shape)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Interpolated in log sigma between whole training steps."""
        t = timestep.float().clamp(min=0, max=TRAINING_STEPS - 1)
        share = t.frac()
        low, high = self._log_sigmas[t.floor().long()], self._log_sigmas[t.ceil().long()]
        return ((1 - share) * low + share * high).exp()

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return 999999999.9  # above every sigma: "from the very start" whatever the schedule begins with
        if percent >= 1.0:
            return 0.0
        return float(self.sigma(torch.tensor((1.0 - percent) * (TRAINING_STEPS - 1.0))))


def simple(table: SigmaTable, steps: int) -> Tensor:
    """Every (1000 / n)-th entry of the table, from its end, then 0."""
    stride = len(table.sigmas) / steps
    return _with_zero([float(table.sigmas[-(1 + int(i * stride))]) for i in range(steps)])


def normal(table: SigmaTable, steps: int) -> Tensor:
    """Equally spaced timesteps from the largest sigma to the smallest, then 0."""
    first, last = _timestep_range(table)
    if math.isclose(float(table.sigma(last)), 0.0, abs_tol=1e-5):
        # The table itself ends at zero: that entry is the final one.
        return torch.tensor([float(table.sigma(t)) for t in torch.linspace(first, last, steps + 1)])
    return _with_zero([float(table.sigma(t)) for t in torch.linspace(first, last, steps)])


def sgm_uniform(table: SigmaTable, steps: int) -> Tensor:
    """Like `normal`, with one step more whose last timestep is replaced by 0."""
    first, last = _timestep_range(table)
    return _with_zero([float(table.sigma(t)) for t in torch.linspace(first, last, steps + 1)[:-1]])


def ddim_uniform(table: SigmaTable, steps: int) -> Tensor:
    """Whole training steps at an equal stride from step 1 upwards; may have a step more than asked for.

    Source: Song et al. 2021 (DDIM), appendix D.2, the linear selection.
    """
    rising = [0.0]
    if math.isclose(float(table.sigmas[1]), 0.0, abs_tol=1e-5):
        steps, rising = steps + 1, []
    stride = max(len(table.sigmas) // steps, 1)
    rising += [float(sigma) for sigma in table.sigmas[1::stride]]
    return torch.tensor(rising[::-1])


def karras(table: SigmaTable, steps: int, rho: float = 7.0) -> Tensor:
    """Equally spaced in sigma^(1/rho). Source: Karras et al. 2022, eq. 5."""
    low, high = _sigma_range(table)
    ramp = torch.linspace(0, 1, steps)
    low_root, high_root = low ** (1 / rho), high ** (1 / rho)
    sigmas = (high_root + ramp * (low_root - high_root)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def exponential(table: SigmaTable, steps: int) -> Tensor:
    """Equally spaced in log sigma."""
    low, high = _sigma_range(table)
    sigmas = torch.linspace(math.log(high), math.log(low), steps).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def beta(table: SigmaTable, steps: int, shape: float = 0.6) -> Tensor:
    """Training steps at the quantiles of a Beta(0.6, 0.6) distribution; equal neighbours count once.

    Source: Lee et al. 2024, "Beta Sampling is All You Need".
    """
    shares = 1 - np.linspace(0, 1, steps, endpoint=False)
    indices = np.rint(betaincinv(shape, shape, shares) * (len(table.sigmas) - 1)).astype(int)
    kept = [int(index) for i, index in enumerate(indices) if i == 0 or index != indices[i - 1]]
    return _with_zero([float(table.sigmas[index]) for index in kept])


def linear_quadratic(table: SigmaTable, steps: int, threshold: float = 0.025) -> Tensor:
    """Half the steps take away noise linearly up to `threshold`, the rest quadratically up to 1.

    The parabola meets the line in value and slope. Source: Polyak et al. 2024 (Movie Gen), section 3.4.2.
    """
    if steps == 1:
        removed = [0.0, 1.0]
    else:
        lines = steps // 2
        curved = steps - lines
        surplus = lines - threshold * steps
        quadratic = surplus / (lines * curved**2)
        slope = threshold / lines - 2 * surplus / (curved**2)
        offset = quadratic * (lines**2)
        removed = [i * threshold / lines for i in range(lines)]
        removed += [quadratic * (i**2) + slope * i + offset for i in range(lines, steps)]
        removed += [1.0]
    return torch.tensor([1.0 - share for share in removed]) * table.sigmas[-1]


def kl_optimal(table: SigmaTable, steps: int) -> Tensor:
    """Equally spaced in arctan(sigma). Source: Sabour et al. 2024 (Align Your Steps), theorem 3.1."""
    low, high = _sigma_range(table)
    # One step: the formula divides by n - 1; it can only start at the largest sigma.
    share = torch.arange(steps, dtype=torch.float32) / max(steps - 1, 1)
    sigmas = torch.zeros(steps + 1)
    sigmas[:-1] = (share * math.atan(low) + (1 - share) * math.atan(high)).tan()
    return sigmas


SCHEDULERS: dict[str, Callable[[SigmaTable, int], Tensor]] = {
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "karras": karras,
    "exponential": exponential,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "normal": normal,
    "linear_quadratic": linear_quadratic,
    "kl_optimal": kl_optimal,
}

# These look past the next sigma, so the reference computes one step more and drops the last sigma before zero.
_DROP_LAST_BUT_ONE = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})


def schedule(table: SigmaTable, *, scheduler: str, sampler_name: str, steps: int, denoise: float = 1.0) -> Tensor:
    """The sigmas of one KSampler run; empty when `denoise` is 0.

    denoise < 1: the list for steps / denoise steps is computed and its last steps + 1 sigmas are kept.
    """
    if denoise <= 0.0:
        return torch.zeros(0)
    wanted = steps if denoise > 0.9999 else int(steps / denoise)
    if sampler_name in _DROP_LAST_BUT_ONE:
        sigmas = SCHEDULERS[scheduler](table, wanted + 1)
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    else:
        sigmas = SCHEDULERS[scheduler](table, wanted)
    return sigmas if denoise > 0.9999 else sigmas[-(steps + 1) :]


def cut(sigmas: Tensor, *, start: int, end: int, leftover_noise: bool) -> Tensor:
    """KSamplerAdvanced's slice [start : end + 1]; empty when nothing is left to do.

    Cut before its end, the list's last sigma becomes 0 unless leftover noise is wanted.
    """
    if end < len(sigmas) - 1:
        sigmas = sigmas[: end + 1].clone()
        if not leftover_noise:
            sigmas[-1] = 0
    return sigmas[start:] if start < len(sigmas) - 1 else sigmas[:0]


def _timestep_range(table: SigmaTable) -> tuple[Tensor, Tensor]:
    return table.timestep(table.sigmas[-1]), table.timestep(table.sigmas[0])


def _sigma_range(table: SigmaTable) -> tuple[float, float]:
    return float(table.sigmas[0]), float(table.sigmas[-1])


def _with_zero(sigmas: list[float]) -> Tensor:
    return torch.tensor([*sigmas, 0.0])

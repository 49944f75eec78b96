"""Randomness of a run: the initial noise, and the noise that stochastic samplers add on the way.

Every source is seeded by the job's seed, so a run repeats exactly on the same kind of device. The initial noise comes
from the CPU's generator wherever the network runs, so it is the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torchsde
from torch import Tensor

PATH_DIGITS = 6

# (sigma now, sigma next) -> unit normal noise of the latent's shape
NoiseSource = Callable[[Tensor, Tensor], Tensor]


def initial_noise(samples: Tensor, seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """Unit normal noise like `samples`, on the CPU.

    With `batch_index`, item i of the batch gets the noise it would have had as number batch_index[i] of a bigger
    batch: noise is drawn one item at a time up to the largest index, and equal indices share their draw.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if batch_index is None:
        return torch.randn(samples.shape, dtype=samples.dtype, generator=generator)
    one = (1, *samples.shape[1:])
    drawn = [torch.randn(one, dtype=samples.dtype, generator=generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([drawn[index] for index in batch_index])


def device_noise(x: Tensor, seed: int) -> NoiseSource:
    """Fresh noise at each call, from a new generator on x's device seeded with the job's seed.

    On the CPU its first draw equals the initial noise; on CUDA it is that device's stream: results differ by design.
    """
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return lambda _sigma, _sigma_next: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def brownian_noise(x: Tensor, sigmas: Tensor, seed: int, *, on_cpu: bool) -> NoiseSource:
    """Increments of one Brownian path over [smallest positive sigma, largest], scaled to unit variance.

    A path, unlike fresh noise, gives nearly the same picture at any number of steps.
    Source: Li et al. 2020, virtual Brownian tree, as torchsde has it. `on_cpu` draws it there whatever x's device.
    The path is made at the first increment: a run of one step asks for none, and has no interval to make it over.
    """
    device = torch.device("cpu") if on_cpu else x.device
    # torchsde rounds the ends of its interval like this, and complains about times outside it.
    low = round(float(sigmas[sigmas > 0].min()), PATH_DIGITS)
    high = round(float(sigmas.max()), PATH_DIGITS)

    @cache
    def path() -> torchsde.BrownianTree:
        start = torch.zeros(x.shape, dtype=x.dtype, device=device)
        return torchsde.BrownianTree(low, start, high, entropy=seed, tol=10**-PATH_DIGITS)

    def increment(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        before, after = (min(max(float(level), low), high) for level in (sigma, sigma_next))
        moved = -path()(after, before) if before > after else path()(before, after)
        return moved.to(x.device) / (sigma_next - sigma).abs().sqrt()

    return increment

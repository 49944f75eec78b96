"""What the engine adds to each sampler step beside the network: guidance, the sampler's arithmetic, progress.

The network is a stand-in that hands its input back, on a latent too small for arithmetic to count. The baseline is the
same steps as a bare loop: network, guidance and Euler's formula, nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from bench.figure import Figure
from comfyfleet.engine.sampling.sample import sample
from comfyfleet.engine.sampling.schedules import FlowSigmas, schedule
from comfyfleet.engine.values import ConditioningEntry, DiffusionModel

STEPS = 50
ROUNDS = 9
LATENT = (1, 8, 16, 32)
# A step on one H200 takes 80 ms at best (the ACE seed's goal): the host's part is to stay under one percent of it.
GOAL_US = 800.0
MEASURED = ("euler", "er_sde", "dpmpp_2m")


class Echo:
    """A network that costs nothing."""

    key, size_bytes, device = "echo", 0, "cpu"

    def forward(self, x: Tensor, timestep: Tensor, conditioning: ConditioningEntry) -> Tensor:
        return x

    def end_of_run(self) -> None: ...

    def move_to(self, device: str) -> None: ...


class Unscaled:
    channels, axes = 8, 2

    def to_network(self, samples: Tensor) -> Tensor:
        return samples

    def from_network(self, samples: Tensor) -> Tensor:
        return samples


def figures() -> list[Figure]:
    """Takes a second."""
    baseline = _per_step_us(_bare_loop)
    return [
        Figure(
            name=f"sampler step without network, {name}",
            value=_per_step_us(lambda name=name: _sampled(name)),  # type: ignore[misc]
            unit="µs",
            goal=GOAL_US,
            better="lower",
            baseline=baseline,
        )
        for name in MEASURED
    ]


def _per_step_us(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / STEPS * 1e6


def _sampled(sampler_name: str) -> Tensor:
    model = DiffusionModel(
        family="echo", network=Echo(), prediction="flow", sigmas=FlowSigmas(3.0), latent_format=Unscaled()
    )
    prompt = (ConditioningEntry(embedding=torch.zeros(1, 8, 8)),)
    latent = torch.zeros(LATENT)
    return sample(
        model,
        noise=torch.ones(LATENT),
        latent=latent,
        positive=prompt,
        negative=prompt,
        cfg=4.0,
        sampler_name=sampler_name,
        sigmas=schedule(model.sigmas, scheduler="simple", sampler_name=sampler_name, steps=STEPS),
        seed=1,
        callback=lambda step, steps, x0, x: None,
    )


def _bare_loop() -> Tensor:
    sigmas = schedule(FlowSigmas(3.0), scheduler="simple", sampler_name="euler", steps=STEPS).tolist()
    network, x = Echo(), torch.ones(LATENT)
    prompt = ConditioningEntry(embedding=torch.zeros(2, 8, 8))
    for sigma, sigma_next in pairwise(sigmas):
        velocity = network.forward(torch.cat([x, x]), torch.full((2,), sigma * 1000), prompt)
        positive, negative = (x - velocity[:1] * sigma), (x - velocity[1:] * sigma)
        x0 = negative + (positive - negative) * 4.0
        x = x + (x - x0) / sigma * (sigma_next - sigma)
    return x

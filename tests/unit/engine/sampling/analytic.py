"""A model whose perfect denoiser is known in closed form: every clean latent is drawn from a normal distribution.

With data of mean m and variance s^2, the network's best guess of x0 is linear in x, and a sampler with many small steps
must end where the exact flow of the probability ends: at m + s * z for the starting noise z.
"""

from dataclasses import dataclass, field

import torch

from comfyfleet.engine.sampling.schedules import FlowSigmas, ScaledLinearSigmas
from comfyfleet.engine.values import ConditioningEntry, DiffusionModel


class Unscaled:
    channels, axes = 4, 2

    def to_network(self, samples):
        return samples

    def from_network(self, samples):
        return samples


class Scaled:
    """Network space is twice the VAE's, plus one."""

    channels, axes = 4, 2

    def to_network(self, samples):
        return samples * 2 + 1

    def from_network(self, samples):
        return (samples - 1) / 2


@dataclass
class GaussianNetwork:
    """The exact network for data of mean = the prompt's single number and the given spread; it counts its calls."""

    prediction: str
    spread: float = 0.5
    key: str = "gaussian"
    size_bytes: int = 0
    device: str = "cpu"
    calls: list = field(default_factory=list)
    ended: int = 0

    def forward(self, x, timestep, conditioning):
        assert timestep.shape == (x.shape[0],)
        self.calls.append((x.shape[0], float(timestep[0]), conditioning))
        mean = conditioning.embedding[:, 0, 0].view(-1, *[1] * (x.dim() - 1))
        if self.prediction == "flow":
            sigma = timestep.view(-1, *[1] * (x.dim() - 1)) / 1000
            alpha = 1 - sigma
            noisy = x
        else:
            sigma = ScaledLinearSigmas().sigma(timestep).view(-1, *[1] * (x.dim() - 1))
            alpha, noisy = 1.0, x * (sigma**2 + 1) ** 0.5
        share = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        x0 = mean + share * (noisy - alpha * mean)
        return (noisy - x0) / sigma

    def end_of_run(self):
        self.ended += 1

    def move_to(self, device):
        pass


def a_model(prediction="flow", *, shift=3.0, latent_format=None, **network):
    return DiffusionModel(
        family="test",
        network=GaussianNetwork(prediction=prediction, **network),
        prediction=prediction,
        sigmas=FlowSigmas(shift) if prediction == "flow" else ScaledLinearSigmas(),
        latent_format=latent_format or Unscaled(),
    )


def a_prompt(mean, *, tokens=1):
    return (ConditioningEntry(embedding=torch.full((1, tokens, 1), float(mean))),)

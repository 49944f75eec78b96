"""Guidance: from a noisy latent to the clean one that the prompts ask for.

`Guide` asks the network for what the positive and the negative prompt predict and joins both. It is built once per run
so that a joined pair of conditionings is one object over all steps (networks keep what depends on it).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from comfyfleet.engine.values import Conditioning, ConditioningEntry, DiffusionModel

# Above this many latent elements the two prompts run one after the other: such a forward fills the device alone, and
# joining them would double its working memory for no speed.
JOINED_LIMIT_ELEMENTS = 1_000_000


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on clean latents: away from the negative prompt's, towards the positive one's.

    Source: Ho & Salimans 2022, eq. 6, on x0, with scale = 1 + w.
    """
    return negative + (positive - negative) * scale


class Guide:
    """The guided prediction of x0 for one run. x: (B, …) in the network's scale; sigma: a 0-dim tensor on the CPU."""

    def __init__(
        self, model: DiffusionModel, *, positive: Conditioning, negative: Conditioning, scale: float, noise: Tensor
    ) -> None:
        self._model = model
        self._positive = positive
        self._negative = negative
        self._scale = scale
        self._is_flow = model.prediction == "flow"
        self._pair = _joined(positive, negative, noise)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided x0. At scale 1 the negative prompt has no weight and is not run."""
        if math.isclose(self._scale, 1.0):
            positive = self._predict(x, sigma, self._positive)
            for operation in self._model.guidance_operations:
                positive = operation(positive)
            return positive
        return self.pair(x, sigma)[0]

    def pair(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The guided x0 and the negative prompt's x0, which the CFG++ samplers need (at any scale)."""
        if self._pair is not None:
            positive, negative = self._forward(torch.cat([x, x]), sigma, self._pair).chunk(2)
        else:
            positive = self._predict(x, sigma, self._positive)
            negative = self._predict(x, sigma, self._negative)
        for operation in self._model.guidance_operations:
            positive = operation(positive - negative) + negative
        return guide(positive, negative, self._scale), negative

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0 for one side: several prompts (ConditioningCombine) count equally."""
        predictions = [self._forward(x, sigma, entry) for entry in conditioning]
        return predictions[0] if len(predictions) == 1 else torch.stack(predictions).mean(dim=0)

    def _forward(self, x: Tensor, sigma: Tensor, entry: ConditioningEntry) -> Tensor:
        """One network call. flow: x0 = x - sigma v. epsilon: input x / sqrt(sigma^2 + 1), x0 = x - sigma eps."""
        # Filled in place on the device: copying a tensor there would make the host wait for all work queued before it.
        level = float(self._model.sigmas.timestep(sigma))
        timestep = torch.full((x.shape[0],), level, dtype=torch.float32, device=x.device)
        network_input = x if self._is_flow else x / (sigma**2 + 1.0) ** 0.5
        prediction = self._model.network.forward(network_input, timestep, entry)
        return x - prediction * sigma


def _joined(positive: Conditioning, negative: Conditioning, noise: Tensor) -> ConditioningEntry | None:
    """Both prompts as one conditioning of batch 2B, or None where they must run one after the other."""
    if len(positive) != 1 or len(negative) != 1 or noise.numel() * 2 > JOINED_LIMIT_ELEMENTS:
        return None
    first, second = positive[0], negative[0]
    if first.lyrics_strength != second.lyrics_strength:
        return None
    tensors = [
        (first.embedding, second.embedding),
        (first.pooled, second.pooled),
        (first.lyric_ids, second.lyric_ids),
    ]
    joined: list[Tensor | None] = []
    for one, other in tensors:
        if one is None or other is None:
            if one is not other:
                return None
            joined.append(None)
            continue
        if one.shape[1:] != other.shape[1:]:
            return None
        joined.append(torch.cat([_to_batch(one, noise.shape[0]), _to_batch(other, noise.shape[0])]))
    return replace(first, embedding=joined[0], pooled=joined[1], lyric_ids=joined[2])


def _to_batch(tensor: Tensor, batch: int) -> Tensor:
    """Repeat along axis 0 up to `batch` items, or cut to it."""
    if tensor.shape[0] == batch:
        return tensor
    repeats = -(-batch // tensor.shape[0])
    return tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:batch]

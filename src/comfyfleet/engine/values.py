"""What travels along a graph's links: said once, with shapes, units and ranges.

Values are frozen: a node that changes one returns a new one (`dataclasses.replace`), so a cached value is never
altered behind the cache's back. Tensors inside are shared and must not be written in place.

Link type names ("MODEL", "LATENT", …) are ComfyUI's; the classes here are what stands behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ConditioningEntry:
    """One prompt, encoded. CONDITIONING is a tuple of these.

    embedding: (B, tokens, width) float32. pooled: (B, width) or None.
    lyric_ids: (B, n) int64 or None (ACE-Step only); lyrics_strength multiplies the lyric encoder's output.
    weight and the sampling interval [start, end] in percent serve ConditioningAverage/Combine-style nodes.
    """

    embedding: Tensor
    pooled: Tensor | None = None
    lyric_ids: Tensor | None = None
    lyrics_strength: float = 1.0


Conditioning = tuple[ConditioningEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """LATENT. samples: SD1.5 (B, 4, H/8, W/8); Wan (B, 16, T, H/8, W/8); ACE (B, 8, 16, columns). float32, on the CPU.

    Between nodes latents are in the VAE's own scale (Wan: x std + mean; SD1.5: / 0.18215).
    """

    samples: Tensor
    noise_mask: Tensor | None = None
    batch_index: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Audio:
    """AUDIO. waveform: (B, channels, samples) float32 in [-1, 1]."""

    waveform: Tensor
    sample_rate_hz: int


# IMAGE is a Tensor (B, H, W, C) float32 in [0, 1]; MASK is a Tensor (B, H, W) float32 in [0, 1].


@dataclass(frozen=True, kw_only=True)
class Video:
    """VIDEO: frames as an IMAGE batch, a frame rate, and sound or none."""

    frames: Tensor
    fps: Fraction
    audio: Audio | None = None


class Denoiser(Protocol):
    """A diffusion network, ready to be called; it may live in a file until its first call.

    `key` names its weights (file, patches): equal keys mean equal results. `size_bytes` is what it occupies.
    """

    @property
    def key(self) -> str: ...

    size_bytes: int
    device: str  # where `forward` expects its tensors: "cpu", "cuda:0", …; the sampler moves noise and prompts there

    def forward(self, x: Tensor, timestep: Tensor, conditioning: ConditioningEntry) -> Tensor:
        """x: latents in the network's scale, (B, …). timestep: (B,) as the network wants it (flow: 1000 sigma).

        Returns the raw prediction (flow: velocity; SD1.5: epsilon), float32, of x's shape. The conditioning's batch
        is broadcast to B. Whatever does not change over the steps (lyric encoding, cross-attention keys) is computed
        once per conditioning and kept by the network until `end_of_run`.
        """
        ...

    def end_of_run(self) -> None:
        """Drop what was kept for one sampler run."""
        ...

    def move_to(self, device: str) -> None:
        """Called by the memory budget: "cpu", "cuda:0", …; a no-op where it already is."""
        ...


class SigmaTable(Protocol):
    """A model's noise levels: the table of its training steps and the way between sigma and timestep."""

    sigmas: Tensor  # (n,) float32, rising

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told for `sigma`: flow 1000 sigma; SD1.5 the nearest training step in log sigma."""
        ...

    def sigma(self, timestep: Tensor) -> Tensor:
        """The inverse, interpolated."""
        ...

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at a share of the way: 0.0 is the start (most noise)."""
        ...


LatentOperation = Callable[["Tensor"], "Tensor"]


class LatentFormat(Protocol):
    """The form of a model's latents, and how they are scaled between the VAE's space and the network's."""

    channels: int
    axes: int  # after batch and channels: 2 for pictures and sound, 3 for films

    def to_network(self, samples: Tensor) -> Tensor: ...

    def from_network(self, samples: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DiffusionModel:
    """MODEL: a network with its way of being sampled. Patching nodes return a changed copy.

    prediction: "flow" (velocity, x0 = x - sigma v) or "epsilon" (x0 = x - sigma eps, input x / sqrt(sigma^2 + 1)).
    sigmas: the model's sigma table (ModelSamplingSD3 replaces it).
    guidance_operations: applied to cond - uncond before guidance (LatentApplyOperationCFG), in order.
    """

    family: str  # "wan" | "ace_step" | "sd15"
    network: Denoiser
    prediction: str
    sigmas: SigmaTable
    latent_format: LatentFormat
    guidance_operations: tuple[LatentOperation, ...] = ()
    options: dict[str, object] = field(default_factory=dict)


class TextEncoder(Protocol):
    """CLIP: a tokenizer and a text network. `key` names its weights and patches."""

    @property
    def key(self) -> str: ...

    size_bytes: int

    def encode(self, text: str) -> ConditioningEntry:
        """(text:1.2) weights are honoured as the family does. Results may be cached by (key, text)."""
        ...

    def move_to(self, device: str) -> None: ...


@runtime_checkable
class Autoencoder(Protocol):
    """VAE: latents to pictures, films or sound, and back.

    `decode` takes Latent.samples. For pictures and films it yields IMAGE batches (n, H, W, 3) in order, so that
    working memory does not grow with length; joined along axis 0 they are VAEDecode's result.
    """

    @property
    def key(self) -> str: ...

    size_bytes: int

    def decode(self, samples: Tensor) -> Iterator[Tensor]: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """IMAGE batch -> latent samples."""
        ...

    def move_to(self, device: str) -> None: ...


@runtime_checkable
class AudioAutoencoder(Protocol):
    """VAE of a sound model: latents (B, 8, 16, columns) to a waveform and back."""

    @property
    def key(self) -> str: ...

    size_bytes: int

    def decode_audio(self, samples: Tensor, before_piece: Callable[[], None] = ...) -> Audio:
        """`before_piece` is called between pieces of some seconds, and may raise to stop."""
        ...

    def encode_audio(self, audio: Audio) -> Tensor: ...

    def move_to(self, device: str) -> None: ...

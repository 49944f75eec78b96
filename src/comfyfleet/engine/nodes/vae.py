"""Between latents and what is seen or heard.

A film is decoded piece by piece, and a long one is put into a file without a name as it comes: working memory does not
grow with its length. What comes out is an IMAGE like any other; its pages are read when a node looks at a frame.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from comfyfleet.engine.media.resampling import resample
from comfyfleet.engine.registry import NodeRegistry, NodeRun, link
from comfyfleet.engine.values import Audio, AudioAutoencoder, Autoencoder, Latent
from comfyfleet.wire.errors import ModelFileUnusable

NODES = NodeRegistry()
VAE_RATE_HZ = 44100
IN_MEMORY_BYTES = 64 << 20  # a film of up to this stays in memory


@NODES.node(
    "VAEDecode",
    inputs={
        "samples": link("LATENT", tooltip="What a sampler gave."),
        "vae": link("VAE", tooltip="The autoencoder of the latent's model family."),
    },
    outputs=["IMAGE"],
    category="latent",
    display_name="VAE Decode",
    description="Turns a latent into pictures or a film.",
)
def vae_decode(run: NodeRun, *, samples: Latent, vae: Autoencoder) -> tuple[Tensor]:
    if not isinstance(vae, Autoencoder):
        raise ModelFileUnusable("vae is an autoencoder of sound: VAEDecodeAudio decodes with it", node_input="vae")
    return (join(until_stopped(run, vae.decode(samples.samples)), run.folders.scratch_path),)


def until_stopped(run: NodeRun, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """The pieces, for as long as nobody stops the run: a film is stopped within one latent frame."""
    for piece in pieces:
        run.check_stop()
        yield piece


def join(pieces: Iterator[Tensor], scratch: Callable[[], str], in_memory_bytes: int = IN_MEMORY_BYTES) -> Tensor:
    """IMAGE batches in order to one; `scratch` names a file that nobody has, for more than `in_memory_bytes`."""
    waiting: list[Tensor] = []
    held_bytes = 0
    for piece in pieces:
        waiting.append(piece.detach().to("cpu", torch.float32))
        held_bytes += waiting[-1].nbytes
        if held_bytes > in_memory_bytes:
            return _joined_in_file(waiting, pieces, scratch())
    return waiting[0] if len(waiting) == 1 else torch.cat(waiting)


def _joined_in_file(waiting: list[Tensor], more: Iterator[Tensor], path: str) -> Tensor:
    """The pieces that wait, and those still to come, mapped from a file that goes with the tensor."""
    shape, count = waiting[0].shape[1:], 0
    waiting.reverse()
    try:
        with open(path, "wb") as file:
            while (piece := waiting.pop() if waiting else next(more, None)) is not None:
                file.write(piece.detach().to("cpu", torch.float32).contiguous().numpy().data)
                count += len(piece)
        return torch.from_file(path, shared=False, size=count * math.prod(shape)).view(count, *shape)
    finally:
        os.unlink(path)


@NODES.node(
    "VAEEncode",
    inputs={"pixels": link("IMAGE"), "vae": link("VAE")},
    outputs=["LATENT"],
    category="latent",
    display_name="VAE Encode",
)
def vae_encode(run: NodeRun, *, pixels: Tensor, vae: Autoencoder) -> tuple[Latent]:
    if not isinstance(vae, Autoencoder):
        raise ModelFileUnusable("vae is an autoencoder of sound: VAEEncodeAudio encodes with it", node_input="vae")
    return (Latent(samples=vae.encode(pixels[..., :3])),)


@NODES.node(
    "VAEDecodeAudio",
    inputs={"samples": link("LATENT"), "vae": link("VAE")},
    outputs=["AUDIO"],
    category="latent/audio",
    display_name="VAE Decode Audio",
)
def vae_decode_audio(run: NodeRun, *, samples: Latent, vae: AudioAutoencoder) -> tuple[Audio]:
    _demand_sound(vae)
    return (vae.decode_audio(samples.samples, run.check_stop),)


@NODES.node(
    "VAEEncodeAudio",
    inputs={"audio": link("AUDIO"), "vae": link("VAE")},
    outputs=["LATENT"],
    category="latent/audio",
    display_name="VAE Encode Audio",
)
def vae_encode_audio(run: NodeRun, *, audio: Audio, vae: AudioAutoencoder) -> tuple[Latent]:
    _demand_sound(vae)
    waveform = resample(audio.waveform, audio.sample_rate_hz, VAE_RATE_HZ)
    return (Latent(samples=vae.encode_audio(Audio(waveform=waveform, sample_rate_hz=VAE_RATE_HZ))),)


def _demand_sound(vae: object) -> None:
    if not isinstance(vae, AudioAutoencoder):
        raise ModelFileUnusable("vae is an autoencoder of pictures: VAEDecode and VAEEncode take it", node_input="vae")

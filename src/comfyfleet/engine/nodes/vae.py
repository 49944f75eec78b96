"""Between latents and what is seen or heard. A film is decoded piece by piece: working memory stays flat."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from comfyfleet.engine.media.resampling import resample
from comfyfleet.engine.registry import NodeRegistry, NodeRun, link
from comfyfleet.engine.values import Audio, AudioAutoencoder, Autoencoder, Latent

NODES = NodeRegistry()
VAE_RATE_HZ = 44100


@NODES.node(
    "VAEDecode",
    inputs={
        "samples": link("LATENT", tooltip="The latent to be decoded."),
        "vae": link("VAE", tooltip="The VAE model used for decoding the latent."),
    },
    outputs=["IMAGE"],
    category="latent",
    display_name="VAE Decode",
    description="Decodes latent images back into pixel space images.",
)
def vae_decode(run: NodeRun, *, samples: Latent, vae: Autoencoder) -> tuple[Tensor]:
    return (join(until_stopped(run, vae.decode(samples.samples))),)


def until_stopped(run: NodeRun, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """The pieces, for as long as nobody stops the run: a film is stopped within one latent frame."""
    for piece in pieces:
        run.check_stop()
        yield piece


def join(pieces: Iterator[Tensor]) -> Tensor:
    """IMAGE batches in order to one. Pieces are let go as they are copied, so the film is in memory once."""
    waiting = [piece.detach().to("cpu", torch.float32) for piece in pieces]
    if len(waiting) == 1:
        return waiting[0]
    joined = torch.empty((sum(len(piece) for piece in waiting), *waiting[0].shape[1:]))
    waiting.reverse()
    place = 0
    while waiting:
        piece = waiting.pop()
        joined[place : place + len(piece)] = piece
        place += len(piece)
    return joined


@NODES.node(
    "VAEEncode",
    inputs={"pixels": link("IMAGE"), "vae": link("VAE")},
    outputs=["LATENT"],
    category="latent",
    display_name="VAE Encode",
)
def vae_encode(run: NodeRun, *, pixels: Tensor, vae: Autoencoder) -> tuple[Latent]:
    return (Latent(samples=vae.encode(pixels[..., :3])),)


@NODES.node(
    "VAEDecodeAudio",
    inputs={"samples": link("LATENT"), "vae": link("VAE")},
    outputs=["AUDIO"],
    category="latent/audio",
    display_name="VAE Decode Audio",
)
def vae_decode_audio(run: NodeRun, *, samples: Latent, vae: AudioAutoencoder) -> tuple[Audio]:
    return (vae.decode_audio(samples.samples),)


@NODES.node(
    "VAEEncodeAudio",
    inputs={"audio": link("AUDIO"), "vae": link("VAE")},
    outputs=["LATENT"],
    category="latent/audio",
    display_name="VAE Encode Audio",
)
def vae_encode_audio(run: NodeRun, *, audio: Audio, vae: AudioAutoencoder) -> tuple[Latent]:
    waveform = resample(audio.waveform, audio.sample_rate_hz, VAE_RATE_HZ)
    return (Latent(samples=vae.encode_audio(Audio(waveform=waveform, sample_rate_hz=VAE_RATE_HZ))),)

"""Between latents and what is seen or heard. A film is decoded piece by piece (`nodes.pieces`)."""

from __future__ import annotations

from torch import Tensor

from comfyfleet.engine.media.resampling import resample
from comfyfleet.engine.nodes.pieces import join, until_stopped
from comfyfleet.engine.registry import NodeRegistry, NodeRun, link
from comfyfleet.engine.values import Audio, AudioAutoencoder, Autoencoder, Latent
from comfyfleet.wire.errors import ModelFileUnusable

NODES = NodeRegistry()
VAE_RATE_HZ = 44100


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

"""Sound: loaded, shown and saved, one file per item of a batch. AUDIO is `engine.values.Audio`."""

from __future__ import annotations

import torch

from comfyfleet.engine.media.pictures import metadata_texts
from comfyfleet.engine.media.sound import load_sound, save_sound
from comfyfleet.engine.registry import (
    METADATA,
    InputFiles,
    NodeRegistry,
    NodeRun,
    Shown,
    choice,
    integer,
    link,
    real,
    text,
)
from comfyfleet.engine.values import Audio

NODES = NodeRegistry()
PREFIX = "audio/ComfyUI"
MAX_SECONDS = 18446744073709551615


@NODES.node(
    "EmptyAudio",
    inputs={
        "duration": real(60.0, 0.0, MAX_SECONDS, step=0.01, tooltip="How long, in seconds."),
        "sample_rate": integer(44100, 1, 192_000, tooltip="Samples a second."),
        "channels": integer(2, 1, 2, tooltip="1 is mono, 2 is stereo."),
    },
    outputs=["AUDIO"],
    category="audio",
    display_name="Empty Audio",
)
def empty_audio(run: NodeRun, *, duration: float, sample_rate: int, channels: int) -> tuple[Audio]:
    """Silence."""
    return (Audio(waveform=torch.zeros(1, channels, round(duration * sample_rate)), sample_rate_hz=sample_rate),)


@NODES.node(
    "LoadAudio",
    inputs={"audio": choice(InputFiles(media="audio", refusal="Invalid audio file: {}"), audio_upload=True)},
    outputs=["AUDIO"],
    category="audio",
    display_name="Load Audio",
)
def load_audio(run: NodeRun, *, audio: str) -> tuple[Audio]:
    waveform, rate_hz = load_sound(run.folders.input_path(audio))
    return (Audio(waveform=waveform, sample_rate_hz=rate_hz),)


@NODES.node(
    "SaveAudio",
    inputs={"audio": link("AUDIO"), "filename_prefix": text(PREFIX)},
    category="audio",
    display_name="Save Audio (FLAC)",
    is_output=True,
    hidden=METADATA,
)
def save_audio(run: NodeRun, *, audio: Audio, filename_prefix: str = PREFIX) -> Shown:
    return _save(run, audio, filename_prefix, form="flac", quality="")


@NODES.node(
    "SaveAudioMP3",
    inputs={
        "audio": link("AUDIO"),
        "filename_prefix": text(PREFIX),
        "quality": choice(["V0", "128k", "320k"], default="V0"),
    },
    category="audio",
    display_name="Save Audio (MP3)",
    is_output=True,
    hidden=METADATA,
)
def save_audio_mp3(run: NodeRun, *, audio: Audio, filename_prefix: str, quality: str) -> Shown:
    return _save(run, audio, filename_prefix, form="mp3", quality=quality)


@NODES.node(
    "SaveAudioOpus",
    inputs={
        "audio": link("AUDIO"),
        "filename_prefix": text(PREFIX),
        "quality": choice(["64k", "96k", "128k", "192k", "320k"], default="128k"),
    },
    category="audio",
    display_name="Save Audio (Opus)",
    is_output=True,
    hidden=METADATA,
)
def save_audio_opus(run: NodeRun, *, audio: Audio, filename_prefix: str, quality: str) -> Shown:
    return _save(run, audio, filename_prefix, form="opus", quality=quality)


@NODES.node(
    "PreviewAudio",
    inputs={"audio": link("AUDIO")},
    category="audio",
    display_name="Preview Audio",
    is_output=True,
    hidden=METADATA,
)
def preview_audio(run: NodeRun, *, audio: Audio) -> Shown:
    return _save(run, audio, "ComfyUI" + run.folders.temp_suffix(), form="flac", quality="", kind="temp")


def _save(run: NodeRun, audio: Audio, prefix: str, *, form: str, quality: str, kind: str = "output") -> Shown:
    texts = metadata_texts(run.prompt, run.extra_pnginfo)
    shown = []
    for number, waveform in enumerate(audio.waveform):
        name = run.folders.next_output(prefix, form, kind=kind, batch_number=number)
        save_sound(
            name.staging_path,
            waveform,
            audio.sample_rate_hz,
            form=form,
            quality=quality,
            texts=texts,
            before_block=run.check_stop,
        )
        run.commit(name)
        shown.append(name.shown())
    return Shown(ui={"audio": shown})

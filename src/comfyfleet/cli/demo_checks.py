"""What the demo's files really are, read from their bytes and held against what was asked for.

A probe describes a file; a check returns the list of what is wrong with it, empty when all is well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

# LAME's documentation gives V0 about 245 kbit/s on music and V2 about 190: what is below that is no V0 of noise either.
V0_LEAST_KBPS = 190.0


@dataclass(frozen=True, kw_only=True)
class SongFacts:
    """is_vbr: frames differ in bitrate and the header says so. kbps: mean. prompt: the graph in the tags, or None."""

    codec: str
    channels: int
    sample_rate_hz: int
    duration_s: float
    is_vbr: bool
    kbps: float
    prompt: dict[str, Any] | None

    def __str__(self) -> str:
        rate = f"{'VBR' if self.is_vbr else 'CBR'} {self.kbps:.0f} kbit/s"
        sides = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"MP3 {rate}, {sides}, {self.sample_rate_hz / 1000:g} kHz, {self.duration_s:.1f} s"


@dataclass(frozen=True, kw_only=True)
class FilmFacts:
    codec: str
    width: int
    height: int
    frames: int
    fps: float

    def __str__(self) -> str:
        return f"{self.codec.upper()}, {self.width}×{self.height}, {self.frames} frames at {self.fps:g} fps"


def probe_song(path: Path) -> SongFacts:
    """Decode the whole file: a duration from a header proves nothing."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        samples, sizes = 0, []
        for packet in container.demux(stream):
            if packet.size:
                sizes.append(packet.size)
            samples += sum(frame.samples for frame in packet.decode())
        codec = stream.codec_context
        duration_s = samples / codec.sample_rate
        prompt = container.metadata.get("prompt")
        return SongFacts(
            codec=codec.name.removesuffix("float"),
            channels=codec.layout.nb_channels,
            sample_rate_hz=codec.sample_rate,
            duration_s=duration_s,
            is_vbr=has_vbr_header(path.read_bytes()[:65536]) and differ_in_bitrate(sizes),
            kbps=sum(sizes) * 8 / duration_s / 1000,
            prompt=json.loads(prompt) if prompt else None,
        )


def has_vbr_header(head: bytes) -> bool:
    """The first frame of a VBR file is marked `Xing`, that of a constant one `Info`."""
    return b"Xing" in head


def differ_in_bitrate(frame_sizes: Sequence[int]) -> bool:
    """Frames of one bitrate differ by a padding byte at most."""
    return bool(frame_sizes) and max(frame_sizes) - min(frame_sizes) > 1


def probe_film(path: Path) -> FilmFacts:
    """Decode every frame and count them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        codec = stream.codec_context
        return FilmFacts(
            codec=codec.name, width=codec.width, height=codec.height, frames=frames, fps=float(stream.average_rate)
        )


def song_faults(facts: SongFacts) -> list[str]:
    """What keeps it from being the document's song."""
    faults = []
    if not facts.codec.startswith("mp3"):
        faults.append(f"codec is {facts.codec}, not MP3")
    if facts.channels != 2 or facts.sample_rate_hz != 44100:
        faults.append(f"{facts.channels} channels at {facts.sample_rate_hz} Hz, not stereo at 44100")
    if not 179.0 <= facts.duration_s <= 181.0:
        faults.append(f"{facts.duration_s:.2f} s long, not 179 to 181")
    if not facts.is_vbr or facts.kbps < V0_LEAST_KBPS:
        faults.append(f"not VBR V0: {facts}")
    if not facts.prompt or not any(node.get("class_type") == "SaveAudioMP3" for node in facts.prompt.values()):
        faults.append("the prompt is not in its tags")
    return faults


def film_faults(facts: FilmFacts) -> list[str]:
    """What keeps it from being the document's film."""
    faults = []
    if facts.codec != "h264":
        faults.append(f"codec is {facts.codec}, not H.264")
    if (facts.width, facts.height) != (640, 640):
        faults.append(f"{facts.width}×{facts.height}, not 640×640")
    if facts.frames != 81:
        faults.append(f"{facts.frames} frames, not 81")
    if facts.fps != 16:
        faults.append(f"{facts.fps:g} frames a second, not 16")
    return faults

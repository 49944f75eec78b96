"""What the demo's files really are, read from their bytes and held against what was asked for.

A probe describes a file; a check returns the list of what is wrong with it, empty when all is well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

# The VBR header of an MP3 (Xing, written by LAME): quality = 100 - 10 * V - q, so V0 is 91 to 100.
_XING_QUALITY_FLAG = 0x8


@dataclass(frozen=True, kw_only=True)
class SongFacts:
    """vbr_level: the V of `V0`…`V9`, or None for a constant bitrate. prompt: the graph in the tags, or None."""

    codec: str
    channels: int
    sample_rate_hz: int
    duration_s: float
    vbr_level: int | None
    prompt: dict[str, Any] | None

    def __str__(self) -> str:
        rate = "CBR" if self.vbr_level is None else f"VBR V{self.vbr_level}"
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
        samples = sum(frame.samples for frame in container.decode(stream))
        codec = stream.codec_context
        prompt = container.metadata.get("prompt")
        return SongFacts(
            codec=codec.name.removesuffix("float"),
            channels=codec.layout.nb_channels,
            sample_rate_hz=codec.sample_rate,
            duration_s=samples / codec.sample_rate,
            vbr_level=vbr_level(path.read_bytes()[:65536]),
            prompt=json.loads(prompt) if prompt else None,
        )


def vbr_level(head: bytes) -> int | None:
    """V of a VBR MP3 from its Xing header; None where there is none. Source: the LAME tag's public description."""
    at = head.find(b"Xing")
    if at < 0:
        return None
    flags = int.from_bytes(head[at + 4 : at + 8], "big")
    if not flags & _XING_QUALITY_FLAG:
        return None
    # After the flags: frame count and byte count (4 each) and the seek table (100), each only if its flag is set.
    offset = at + 8 + 4 * bool(flags & 1) + 4 * bool(flags & 2) + 100 * bool(flags & 4)
    quality = int.from_bytes(head[offset : offset + 4], "big")
    return (100 - quality) // 10


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
    if facts.vbr_level != 0:
        faults.append(f"not VBR V0 but {facts.vbr_level}")
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

"""What a finished file is: kind and mime by its own bytes, facts by its container, a poster and peaks to show it by.

Blocking, so callers run it in a thread; constant memory whatever the file's size. A file that lies about itself or is
broken yields fewer facts, never an error: the job is done, this is decoration.
"""

from __future__ import annotations

import io
import mimetypes
import os
from dataclasses import dataclass, replace
from pathlib import Path

import av
import av.error
import numpy as np
import puremagic
from numpy.typing import NDArray
from PIL import Image

_HEAD_BYTES = 8192
_POSTER_SIDE = 512
_PEAKS = 200
# Peaks need every sample decoded: an hour of audio is seconds of work, more is not worth it.
_PEAKS_MAX_S = 3600.0
_TEXT_SUFFIXES = frozenset({".txt", ".json", ".csv", ".md", ".srt", ".vtt", ".log", ".yaml", ".yml"})
_EXTRA_TYPES = {
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".opus": "audio/ogg",
    ".flac": "audio/flac",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".safetensors": "application/octet-stream",
    ".latent": "application/octet-stream",
}


@dataclass(frozen=True, kw_only=True)
class MediaFacts:
    """None where it does not apply or the file does not say."""

    kind: str  # image | video | audio | text | file
    mime: str
    duration_s: float | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    frames: int | None = None
    channels: int | None = None
    sample_rate: int | None = None


def media_facts(path: str | Path, data: bytes | None = None) -> MediaFacts:
    """Look at a file, or at its `data` where that was read already.

    Never raises for what is in it; raises OSError when it cannot be read.
    """
    mime = sniffed_type(path) if data is None else type_of_bytes(data[:_HEAD_BYTES], os.path.basename(path))
    family = mime.partition("/")[0]
    if mime == "image/png" and data is not None and (size := _still_png_size(data)):
        return MediaFacts(kind="image", mime=mime, width=size[0], height=size[1])
    if family == "image":
        return _image_facts(path if data is None else io.BytesIO(data), mime)
    if family in ("video", "audio"):
        return _container_facts(path, mime)
    return MediaFacts(kind="text" if family == "text" or mime == "application/json" else "file", mime=mime)


def sniffed_type(path: str | Path) -> str:
    """The media type by the first bytes, else by the name, else octet-stream."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return type_of_bytes(head, os.path.basename(path))


def type_of_bytes(head: bytes, name: str) -> str:
    """As `sniffed_type`, for the beginning of a file called `name`."""
    known = _by_signature(head)
    if known:
        return known
    suffix = Path(name).suffix.lower()
    by_name = _EXTRA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or ""
    if suffix in _TEXT_SUFFIXES:
        return by_name or "text/plain"
    try:
        guesses = puremagic.magic_string(head, name)
    except (puremagic.PureError, ValueError):
        guesses = []
    guessed = next((guess.mime_type for guess in guesses if guess.mime_type and guess.confidence >= 0.6), "")
    return guessed or by_name or "application/octet-stream"


def _by_signature(head: bytes) -> str:
    """The dozen formats that nodes really write, by their published magic numbers; "" for others."""
    for magic, mime in (
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"GIF87a", "image/gif"),
        (b"GIF89a", "image/gif"),
        (b"fLaC", "audio/flac"),
        (b"ID3", "audio/mpeg"),
        (b"\x1aE\xdf\xa3", "video/webm" if b"webm" in head[:64] else "video/x-matroska"),
        (b"glTF", "model/gltf-binary"),
    ):
        if head.startswith(magic):
            return mime
    if head[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo"}.get(head[8:12], "")
    if head[:4] == b"OggS":
        return "video/ogg" if b"theora" in head[:128] else "audio/ogg"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"avif", b"avis"):
            return "image/avif"
        if brand in (b"heic", b"heix", b"mif1"):
            return "image/heic"
        if brand == b"qt  ":
            return "video/quicktime"
        return "audio/mp4" if brand in (b"M4A ", b"M4B ") else "video/mp4"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2:  # MPEG audio frame, layer III or II, no tag
        return "audio/mpeg"
    return ""


def _still_png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a plain PNG, from its first chunk; None for one that may be animated or is odd.

    Nearly every output is one, and opening it as a picture costs more than keeping it. Layout: PNG specification,
    11.2.1 (IHDR comes first: length 13, name, two big-endian sizes); an animation's acTL stands before the first IDAT.
    """
    first_pixels = data.find(b"IDAT")
    if data[8:16] != b"\0\0\0\rIHDR" or first_pixels < 0 or data.find(b"acTL", 0, first_pixels) >= 0:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return (width, height) if 0 < width < 2**31 and 0 < height < 2**31 else None


def _image_facts(source: str | Path | io.BytesIO, mime: str) -> MediaFacts:
    facts = MediaFacts(kind="image", mime=mime)
    try:
        with Image.open(source) as image:  # reads the header only
            frames = getattr(image, "n_frames", 1)
            return replace(facts, width=image.width, height=image.height, frames=frames if frames > 1 else None)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return facts


def _container_facts(path: str | Path, mime: str) -> MediaFacts:
    family = mime.partition("/")[0]
    try:
        with av.open(str(path)) as container:
            video = next((s for s in container.streams.video if not _is_cover(s)), None)
            audio = next(iter(container.streams.audio), None)
            facts = MediaFacts(
                kind="video" if video is not None else "audio",
                mime=mime if video is not None or family == "audio" else mime.replace("video/", "audio/"),
                duration_s=round(container.duration / av.time_base, 3) if container.duration else None,
            )
            if video is not None:
                rate = video.average_rate
                facts = replace(
                    facts,
                    width=video.codec_context.width or None,
                    height=video.codec_context.height or None,
                    fps=round(float(rate), 3) if rate else None,
                    frames=video.frames or None,
                )
                if facts.duration_s is None and facts.frames and facts.fps:
                    facts = replace(facts, duration_s=round(facts.frames / facts.fps, 3))
            if audio is not None:
                facts = replace(facts, channels=audio.channels or None, sample_rate=audio.sample_rate or None)
            return facts
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        return MediaFacts(kind=family, mime=mime)


def _is_cover(stream: object) -> bool:
    """True for a picture attached to a song, which is no film."""
    disposition = getattr(stream, "disposition", None)
    return bool(disposition is not None and "attached_pic" in str(disposition).lower())


def poster(path: str | Path) -> bytes | None:
    """A JPEG of the film's first frame, at most 512 pixels wide or high; None when it cannot be decoded."""
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                image = frame.to_image()
                image.thumbnail((_POSTER_SIDE, _POSTER_SIDE))
                out = io.BytesIO()
                image.convert("RGB").save(out, "JPEG", quality=82)
                return out.getvalue()
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        return None
    return None


def peaks(path: str | Path, duration_s: float | None) -> list[float] | None:
    """200 peaks between 0 and 1 over the whole length, for drawing a waveform; None when unknown or too long."""
    if not duration_s or duration_s > _PEAKS_MAX_S:
        return None
    found = np.zeros(_PEAKS, dtype=np.float32)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            resample = av.AudioResampler(format="fltp")
            for decoded in container.decode(stream):
                for frame in resample.resample(decoded):
                    _take_peak(found, frame, duration_s)
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        return None
    return [round(value, 3) for value in np.minimum(found, 1.0).astype(float).tolist()]


def _take_peak(found: NDArray[np.float32], frame: av.AudioFrame, duration_s: float) -> None:
    samples = np.abs(frame.to_ndarray()).max(axis=0)  # the louder channel
    at_s = float(frame.time or 0.0)
    first = min(int(at_s / duration_s * _PEAKS), _PEAKS - 1)
    last = min(int((at_s + len(samples) / frame.sample_rate) / duration_s * _PEAKS), _PEAKS - 1)
    for slot, piece in zip(range(first, last + 1), np.array_split(samples, last - first + 1), strict=True):
        if len(piece):
            found[slot] = max(found[slot], piece.max())

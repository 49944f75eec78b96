"""Sound to and from files: FLAC, MP3 (V0 is LAME's best variable rate), Opus. AUDIO is (B, channels, samples)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import av
import numpy as np
import torch
from torch import Tensor

from comfyfleet.engine.media.resampling import resample

ENCODERS = {"flac": "flac", "mp3": "libmp3lame", "opus": "libopus"}
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
BIT_RATES = {"64k": 64_000, "96k": 96_000, "128k": 128_000, "192k": 192_000, "320k": 320_000}


def save_sound(
    path: str,
    waveform: Tensor,
    rate_hz: int,
    *,
    form: str,
    quality: str,
    texts: Mapping[str, str],
    before_block: Callable[[], None] = lambda: None,
) -> None:
    """One item (channels, samples) as `form` "flac", "mp3" or "opus". `quality` is "V0" or a key of BIT_RATES.

    `before_block` is called before each second of sound, and may raise to stop.
    """
    if form == "opus":
        waveform, rate_hz = _for_opus(waveform, rate_hz)
    with av.open(path, mode="w", format=form) as container:
        for name, text in texts.items():
            container.metadata[name] = text
        layout = "mono" if waveform.shape[0] == 1 else "stereo"
        stream = container.add_stream(ENCODERS[form], rate=rate_hz, layout=layout)
        if quality in BIT_RATES and form != "flac":
            stream.bit_rate = BIT_RATES[quality]
        elif quality == "V0":
            stream.codec_context.qscale = True  # variable rate, with LAME's quality left at 0
        for start in range(0, waveform.shape[1], rate_hz):
            before_block()
            samples = waveform[:, start : start + rate_hz].t().reshape(1, -1).float().cpu().contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
            frame.sample_rate, frame.pts = rate_hz, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def load_sound(path: str) -> tuple[Tensor, int]:
    """((1, channels, samples) float32, sample rate) of the first sound stream. Raises ValueError when there is none."""
    with av.open(path) as container:
        if not container.streams.audio:
            raise ValueError("there is no sound in this file")
        stream = container.streams.audio[0]
        rate_hz, channels = stream.codec_context.sample_rate, stream.channels
        blocks = []
        for frame in container.decode(stream):
            block = frame.to_ndarray()
            if not frame.format.is_planar:
                block = block.reshape(-1, channels).T
            blocks.append(_to_float(block))
    return torch.from_numpy(np.concatenate(blocks, axis=1))[None], rate_hz


def _for_opus(waveform: Tensor, rate_hz: int) -> tuple[Tensor, int]:
    """Opus knows five rates: the next higher one is taken, or the highest."""
    wanted = next((rate for rate in OPUS_RATES if rate >= rate_hz), OPUS_RATES[-1])
    return resample(waveform, rate_hz, wanted), wanted


def _to_float(block: np.ndarray) -> np.ndarray:
    """Integer samples to [-1, 1]."""
    if block.dtype == np.int16:
        return block.astype(np.float32) / 2**15
    if block.dtype == np.int32:
        return block.astype(np.float32) / 2**31
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128.0) / 128.0
    return block.astype(np.float32)

"""Sound as ACE-Step v1's autoencoder hears it: log-mel spectrograms, 128 bands from 40 Hz to 16 kHz at 44.1 kHz.

The filter bank is computed here; a published checkpoint need not hold one. Source of the mel scale and its area norm:
Slaney 1998 (Auditory Toolbox).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE_HZ = 44_100
WINDOW_SAMPLES = 2048
HOP_SAMPLES = 512
BANDS = 128
LOWEST_HZ, HIGHEST_HZ = 40.0, 16_000.0
QUIETEST = 1e-5

# Slaney's scale: linear below 1 kHz at 15 mel a kilohertz, logarithmic above, 27 mel for a factor of 6.4.
LINEAR_HZ_PER_MEL = 200.0 / 3.0
LOG_START_HZ = 1000.0
LOG_START_MEL = LOG_START_HZ / LINEAR_HZ_PER_MEL
LOG_STEP = math.log(6.4) / 27.0


def mel_of(frequency_hz: float) -> float:
    if frequency_hz < LOG_START_HZ:
        return frequency_hz / LINEAR_HZ_PER_MEL
    return LOG_START_MEL + math.log(frequency_hz / LOG_START_HZ) / LOG_STEP


def frequencies_of(mels: Tensor) -> Tensor:
    """Hertz, the inverse of `mel_of`."""
    above = LOG_START_HZ * torch.exp(LOG_STEP * (mels - LOG_START_MEL))
    return torch.where(mels >= LOG_START_MEL, above, mels * LINEAR_HZ_PER_MEL)


def filter_bank() -> Tensor:
    """(1025, 128): triangles between neighbouring band edges, each of area 1 in hertz times two."""
    bins = torch.linspace(0, SAMPLE_RATE_HZ // 2, WINDOW_SAMPLES // 2 + 1)
    edges = frequencies_of(torch.linspace(mel_of(LOWEST_HZ), mel_of(HIGHEST_HZ), BANDS + 2))
    widths = edges.diff()
    distance = edges[None, :] - bins[:, None]  # (1025, 130)
    rising = -distance[:, :-2] / widths[:-1]
    falling = distance[:, 2:] / widths[1:]
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    return triangles * (2.0 / (edges[2:] - edges[:-2]))


def log_mel(waveform: Tensor) -> Tensor:
    """(n, samples) at 44.1 kHz -> (n, 128, samples // 512), natural logarithm, in float32."""
    margin = WINDOW_SAMPLES - HOP_SAMPLES
    padded = F.pad(waveform.float()[:, None], (margin // 2, (margin + 1) // 2), mode="reflect")[:, 0]
    window = torch.hann_window(WINDOW_SAMPLES, device=waveform.device)
    spectrum = torch.stft(
        padded, WINDOW_SAMPLES, hop_length=HOP_SAMPLES, window=window, center=False, return_complex=True
    )
    magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-6).sqrt()  # (n, 1025, frames)
    bands = magnitude.transpose(1, 2) @ filter_bank().to(waveform.device)
    return bands.clamp_min(QUIETEST).log().transpose(1, 2)

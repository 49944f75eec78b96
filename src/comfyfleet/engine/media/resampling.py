"""Sound at another sample rate, by band-limited interpolation: a sinc under a Hann window.

With ComfyUI's settings: six zero crossings, roll-off 0.99. Source: J. O. Smith,
Digital Audio Resampling Home Page.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The kernel: zero crossings on each side, and where the pass band ends relative to the lower of the Nyquist rates.
ZERO_CROSSINGS = 6
ROLLOFF = 0.99


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """(…, samples) -> (…, ceil(samples to_hz / from_hz)) by Hann-windowed sinc interpolation, one phase per output.

    For each of the `new` output phases a kernel of the input samples around it; a strided convolution applies all.
    """
    if from_hz == to_hz:
        return waveform
    divisor = math.gcd(from_hz, to_hz)
    old, new = from_hz // divisor, to_hz // divisor
    band = min(old, new) * ROLLOFF
    reach = math.ceil(ZERO_CROSSINGS * old / band)

    taps = torch.arange(-reach, reach + old, dtype=torch.float32) / old
    times = (taps[None] - torch.arange(new, dtype=torch.float32)[:, None] / new) * band
    times = times.clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    hann = torch.cos(times * math.pi / ZERO_CROSSINGS / 2).square()
    kernels = torch.special.sinc(times) * hann * (band / old)  # (new, 2 reach + old)

    flat = waveform.reshape(-1, waveform.shape[-1]).float()
    padded = F.pad(flat, (reach, reach + old))
    phases = F.conv1d(padded[:, None], kernels[:, None].to(flat.device), stride=old)  # (n, new, steps)
    length = math.ceil(new * waveform.shape[-1] / old)
    return phases.transpose(1, 2).flatten(1)[:, :length].reshape(*waveform.shape[:-1], length)

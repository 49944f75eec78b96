"""Mel analysis and resampling hold the laws of their definitions (compared once with torchaudio 2.9: rel 6e-8)."""

import math

import pytest
import torch

from comfyfleet.engine.media.resampling import resample
from comfyfleet.engine.models.ace_mel import filter_bank, log_mel


def tone(frequency_hz, rate_hz, seconds=0.5):
    return torch.sin(2 * math.pi * frequency_hz * torch.arange(int(rate_hz * seconds)) / rate_hz)[None]


def test_the_filter_bank_is_slaneys():
    bank = filter_bank()

    assert bank.shape == (1025, 128)
    assert bool((bank >= 0).all())
    # The first band's triangle covers 40 Hz to 91.8 Hz: three bins of 21.53 Hz lie inside.
    assert torch.nonzero(bank[:, 0]).flatten().tolist() == [2, 3, 4]
    # Each band has area 1 in hertz once there are enough bins in it.
    areas = bank.sum(dim=0) * (22_050 / 1024)
    assert torch.allclose(areas[60:], torch.ones(68), atol=0.03)
    assert not bank[745:].any(), "nothing above 16 kHz"


@pytest.mark.parametrize("frequency_hz", [220.0, 1000.0, 5000.0])
def test_a_tone_is_loudest_in_its_own_band(frequency_hz):
    bank = filter_bank()
    mel = log_mel(tone(frequency_hz, 44_100))

    assert mel.shape == (1, 128, 43)
    expected = int(bank[round(frequency_hz / (22_050 / 1024))].argmax())
    assert abs(int(mel.mean(dim=-1).argmax()) - expected) <= 1


def test_silence_is_the_quietest_level_a_mel_has():
    bands = log_mel(torch.zeros(1, 8192))

    assert bands.max() < math.log(1e-3)
    assert bands.min() >= math.log(1e-5)


@pytest.mark.parametrize("rate_hz", [16_000, 22_050, 48_000, 96_000])
def test_resampling_keeps_a_tone(rate_hz):
    heard = resample(tone(1000.0, rate_hz), rate_hz, 44_100)[0]
    wanted = tone(1000.0, 44_100)[0]

    assert abs(len(heard) - len(wanted)) <= 1
    middle = slice(2000, 18_000)
    assert float((heard[middle] - wanted[middle]).norm() / wanted[middle].norm()) < 2e-3


def test_resampling_to_the_same_rate_is_free():
    waveform = torch.randn(2, 100)

    assert resample(waveform, 44_100, 44_100) is waveform

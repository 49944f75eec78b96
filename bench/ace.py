"""ACE-Step: the documents' song in its parts on the CPU, and, where a GPU is, a full-size model of random weights.

Values do not change speed, so random weights measure a step of the published size. Its baseline is the card's dense
bfloat16 limit (790 TFLOP/s on an H200).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.figure import Figure
from comfyfleet.engine.media.sound import save_sound
from comfyfleet.engine.miniatures import ace as miniature
from comfyfleet.engine.models.ace import AceTextEncoder
from comfyfleet.engine.models.ace_transformer import PUBLISHED_SIZES, AceTransformer, rotary_tables
from comfyfleet.engine.models.open_file import open_all_in_one
from comfyfleet.engine.nodes.sampling import tonemap_reinhard
from comfyfleet.engine.sampling.noise import initial_noise
from comfyfleet.engine.sampling.sample import sample
from comfyfleet.engine.sampling.schedules import FlowSigmas, schedule
from comfyfleet.engine.values import ConditioningEntry, DiffusionModel

SONG_COLUMNS = 1937  # 180 s
STEPS = 65
TAGS = "funk, pop, soul, rock, melodic, guitar, drums, bass, keyboard, percussion, 105 BPM, energetic, upbeat, groovy"
VERSE = "[verse]\nNeon lights they flicker bright\nCity hums in dead of night\nRhythms pulse through concrete veins\n\n"
LYRICS = VERSE * 4
FORWARD_TFLOP = 8.65  # of the published model, for one song of 180 s
GPU_STEPS = 10


def figures() -> list[Figure]:
    """Takes about half a minute on two cores; a minute more with a GPU."""
    found = _song_on_the_cpu()
    return [*found, *_step_on_the_gpu()] if torch.cuda.is_available() else found


def _song_on_the_cpu() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / miniature.CHECKPOINT
        tensors, metadata = miniature.tensors(0)
        save_file(tensors, path, metadata)
        model, clip, vae = open_all_in_one(str(path), "cpu")
        assert isinstance(clip, AceTextEncoder)

        prompt, text_s = _timed(lambda: clip.encode_song(TAGS, LYRICS, 0.99, vocabulary=None))
        latent, sampling_s = _timed(lambda: _sampled(model, prompt, STEPS))
        audio, decoding_s = _timed(lambda: vae.decode_audio(latent))
        wave = Path(folder) / "song.mp3"
        _, encoding_s = _timed(
            lambda: save_sound(str(wave), audio.waveform[0], 44_100, form="mp3", quality="V0", texts={})
        )
    parts = [
        Figure(name="ACE seed, text", value=text_s, unit="s", goal=None, better="lower"),
        Figure(name=f"ACE seed, sampling, {STEPS} steps", value=sampling_s, unit="s", goal=None, better="lower"),
        Figure(name="ACE seed, decoding", value=decoding_s, unit="s", goal=None, better="lower"),
        Figure(name="ACE seed, MP3 V0", value=encoding_s, unit="s", goal=None, better="lower"),
    ]
    whole = sum(part.value for part in parts)
    return [*parts, Figure(name="ACE seed, whole", value=whole, unit="s", goal=35.0, better="lower")]


def _sampled(model: DiffusionModel, prompt: ConditioningEntry, steps: int) -> torch.Tensor:
    silence = replace(prompt, embedding=prompt.embedding * 0, lyric_ids=prompt.lyric_ids * 0)
    latent = torch.zeros(1, 8, 16, SONG_COLUMNS)
    sigmas = FlowSigmas(6.0)
    operations = (lambda each: tonemap_reinhard(each, 1.15),)
    return sample(
        replace(model, sigmas=sigmas, guidance_operations=operations),
        noise=initial_noise(latent, 1),
        latent=latent,
        positive=(prompt,),
        negative=(silence,),
        cfg=4.0,
        sampler_name="er_sde",
        sigmas=schedule(sigmas, scheduler="linear_quadratic", sampler_name="er_sde", steps=steps),
        seed=1,
    )


def _step_on_the_gpu() -> list[Figure]:
    """One sampler step of the published size: both prompts in one forward of batch 2, in bfloat16."""
    network = _published_size("cuda")
    with torch.no_grad():
        x = torch.randn(2, 8, 16, SONG_COLUMNS, device="cuda", dtype=torch.bfloat16)
        time_now = torch.full((2,), 700.0, device="cuda")
        text = torch.randn(2, 71, 768, device="cuda", dtype=torch.bfloat16)
        context = network.prepare(network.encode_context(text, torch.ones(2, 235, device="cuda").long(), 0.99))
        rotary = rotary_tables(SONG_COLUMNS, torch.device("cuda"))

        def step() -> None:
            for _ in range(GPU_STEPS):
                network(x, time_now, context, rotary)
            torch.cuda.synchronize()

        step()
        _, seconds = _timed(step)
    per_step = seconds / GPU_STEPS
    return [
        Figure(name="ACE full size, a step", value=per_step, unit="s", goal=0.08, better="lower"),
        Figure(
            name="ACE full size, throughput",
            value=2 * FORWARD_TFLOP / per_step,
            unit="TFLOP/s",
            goal=None,
            better="higher",
            baseline=790.0,
        ),
    ]


def _published_size(device: str) -> AceTransformer:
    network = AceTransformer(PUBLISHED_SIZES).to_empty(device=device).to(torch.bfloat16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return network


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start

"""The miniature ACE-Step checkpoint is a published file in small: same layout, same code path, its own vocabularies."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyfleet.engine.miniatures import ace as miniature
from comfyfleet.engine.models.open_file import open_all_in_one
from comfyfleet.engine.sampling.noise import initial_noise
from comfyfleet.engine.sampling.sample import sample
from comfyfleet.engine.sampling.schedules import FlowSigmas, schedule
from comfyfleet.engine.values import Audio


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("miniatures") / miniature.CHECKPOINT
    made, metadata = miniature.tensors(0)
    save_file(made, path, metadata)
    return path


def test_it_is_the_same_for_the_same_seed_and_says_what_it_is():
    one, metadata = miniature.tensors(3)
    same, _ = miniature.tensors(3)
    other, _ = miniature.tensors(4)

    assert metadata["miniature"] == "true"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["vae.dcae.decoder.conv_in.weight"], other["vae.dcae.decoder.conv_in.weight"])


def test_only_the_lyric_vocabulary_has_no_published_name(file):
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())

    prefixes = ("model.diffusion_model.", "vae.dcae.", "vae.vocoder.", "text_encoders.umt5base.transformer.")
    loose = {name for name in names if not name.startswith(prefixes)}
    assert loose == {"text_encoders.spiece_model", "text_encoders.ace_lyrics_vocab"}


def test_a_song_of_it_is_neither_silent_nor_clipped(file):
    model, clip, vae = open_all_in_one(str(file), "cpu")
    prompt = clip.encode_song("funk, 105 BPM, 色", "[verse]\nla la 世界\n[fr]été", 0.99, vocabulary=None)
    silence = replace(prompt, embedding=prompt.embedding * 0, lyric_ids=prompt.lyric_ids * 0)
    latent = torch.zeros(1, 8, 16, 40)
    model = replace(model, sigmas=FlowSigmas(6.0))

    samples = sample(
        model,
        noise=initial_noise(latent, 7),
        latent=latent,
        positive=(prompt,),
        negative=(silence,),
        cfg=4.0,
        sampler_name="er_sde",
        sigmas=schedule(model.sigmas, scheduler="linear_quadratic", sampler_name="er_sde", steps=8),
        seed=7,
    )
    audio = vae.decode_audio(samples)

    assert audio.waveform.shape == (1, 2, 40 * 4096)
    assert 0.02 < float(audio.waveform.std()) <= 0.2001
    assert float(audio.waveform.abs().max()) < 1.0
    assert not torch.equal(audio.waveform[0, 0], audio.waveform[0, 1]), "stereo"


def test_its_words_and_tags_are_heard(file):
    model, clip, _ = open_all_in_one(str(file), "cpu")
    x, time = torch.randn(1, 8, 16, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([700.0])

    def velocity(tags, lyrics):
        return model.network.forward(x, time, clip.encode_song(tags, lyrics, 1.0, vocabulary=None))

    first = velocity("funk", "one two")
    assert torch.equal(velocity("funk", "one two"), first)
    assert not torch.allclose(velocity("rock", "one two"), first)
    assert not torch.allclose(velocity("funk", "two one"), first)


def test_it_encodes_sound_too(file):
    _, _, vae = open_all_in_one(str(file), "cpu")
    sound = torch.randn(1, 2, 4 * 4096, generator=torch.Generator().manual_seed(1)) * 0.1

    latents = vae.encode_audio(Audio(waveform=sound, sample_rate_hz=44_100))

    assert latents.shape == (1, 8, 16, 4)
    assert bool(latents.isfinite().all())

"""The documents' ACE-Step graph, made small, ends in the reference's latents and waveform (goldens/ace)."""

from dataclasses import replace

import pytest
import torch

from comfyfleet.engine.nodes.sampling import tonemap_reinhard
from comfyfleet.engine.sampling.noise import initial_noise
from comfyfleet.engine.sampling.sample import sample
from comfyfleet.engine.sampling.schedules import FlowSigmas, schedule
from comfyfleet.engine.values import ConditioningEntry
from engine_ace import parts, zeroed
from engine_goldens import facts, relative_error, tensors

TIGHT = 1e-5


def guided_model(*, shift, tonemap):
    operations = () if tonemap is None else (lambda latent: tonemap_reinhard(latent, tonemap),)
    return replace(parts()[0], sigmas=FlowSigmas(shift), guidance_operations=operations)


def golden_prompt():
    """t2m's conditioning with its tags encoded by us and its ids given."""
    ids = tensors("ace/t2m/record")["lyric_ids.positive"]
    return replace(
        parts()[1].encode(facts("ace/t2m/graph")["14"]["inputs"]["tags"]), lyric_ids=ids, lyrics_strength=0.99
    )


def sampled(case, on_step=None):
    nodes = facts(f"ace/{case}/graph")
    settings = nodes["52"]["inputs"]
    model = guided_model(shift=nodes["51"]["inputs"]["shift"], tonemap=nodes["50"]["inputs"]["multiplier"])
    sigmas = schedule(
        model.sigmas,
        scheduler=settings["scheduler"],
        sampler_name=settings["sampler_name"],
        steps=settings["steps"],
        denoise=1.0,
    )
    assert sigmas.tolist() == facts(f"ace/{case}/record")["sigmas"]
    latent = torch.zeros(1, 8, 16, int(nodes["17"]["inputs"]["seconds"] * 44_100 / 512 / 8))
    prompt = golden_prompt()
    return sample(
        model,
        noise=initial_noise(latent, settings["seed"]),
        latent=latent,
        positive=(prompt,),
        negative=(zeroed(prompt),),
        cfg=settings["cfg"],
        sampler_name=settings["sampler_name"],
        sigmas=sigmas,
        seed=settings["seed"],
        callback=on_step,
    )


def test_tags_are_encoded_as_the_reference_does():
    prompt = golden_prompt()

    assert relative_error(prompt.embedding, tensors("ace/t2m/record")["text.positive"]) <= TIGHT
    assert torch.equal(zeroed(prompt).embedding, tensors("ace/t2m/record")["text.negative"])


@torch.no_grad()
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_whole_songs_lyrics_are_encoded_as_the_reference_does(side):
    golden = tensors("ace/t2m/record")
    rows = parts()[0].network.network().encode_lyrics(golden[f"lyric_ids.{side}"], torch.float32)

    head, tail = golden[f"lyric_encoder.{side}.head"], golden[f"lyric_encoder.{side}.tail"]
    assert relative_error(rows[:, : head.shape[1]], head) <= TIGHT
    assert relative_error(rows[:, -tail.shape[1] :], tail) <= TIGHT


def test_the_song_is_the_references_from_noise_to_waveform():
    golden = tensors("ace/t2m/record")

    latent = sampled("t2m")
    audio = parts()[2].decode_audio(latent)

    assert relative_error(latent, golden["latent"]) <= TIGHT
    assert relative_error(audio.waveform, golden["waveform"]) <= TIGHT


def test_every_step_on_the_way_is_the_references():
    golden, seen = tensors("ace/er_sde_steps/record"), []

    latent = sampled("er_sde_steps", on_step=lambda step, steps, x0, x: seen.append((x.clone(), x0.clone())))

    assert len(seen) == len(golden["step_x"])
    for (x, x0), golden_x, golden_x0 in zip(seen, golden["step_x"], golden["step_x0"], strict=True):
        assert relative_error(x, golden_x) <= TIGHT
        assert relative_error(x0, golden_x0) <= TIGHT
    assert relative_error(latent, golden["latent"]) <= TIGHT


@pytest.mark.parametrize(
    "run", facts("ace/given_ids/record")["runs"], ids=lambda run: f"{run['sampler_name']}-cfg{run['cfg']}"
)
def test_other_samplers_and_strengths_end_in_the_references_latent(run):
    golden = tensors("ace/given_ids/record")
    prompt = ConditioningEntry(embedding=golden["text"], lyric_ids=golden["lyric_ids"], lyrics_strength=0.8)
    noise = initial_noise(torch.zeros(golden["noise"].shape), run["seed"])
    assert torch.equal(noise, golden["noise"])

    latent = sample(
        guided_model(shift=run["shift"], tonemap=run["tonemap_multiplier"]),
        noise=noise,
        latent=torch.zeros_like(noise),
        positive=(prompt,),
        negative=(zeroed(prompt),),
        cfg=run["cfg"],
        sampler_name=run["sampler_name"],
        sigmas=torch.tensor(run["sigmas"]),
        seed=run["seed"],
    )

    assert relative_error(latent, golden[f"{run['key']}.latent"]) <= TIGHT


def test_a_weighted_tag_moves_away_from_the_empty_prompt():
    tags = parts()[1]._tags
    plain = tags.encode_tokens(tags.tokenizer.tokens("rock, loud"))
    heavy = tags.encode_tokens(tags.tokenizer.tokens("rock, (loud:1.4)"))
    empty = tags.encode_tokens(tags.tokenizer.tokens(""))

    assert relative_error(heavy[:, 0], plain[:, 0]) <= TIGHT
    assert relative_error(heavy[:, -1], plain[:, -1]) <= TIGHT, "the end mark has no weight"
    # The empty prompt's first row sees no padding, however long its company is.
    two = tags.encode_tokens(tags.tokenizer.tokens("(a:2.0)"))
    alone = tags.encode_tokens(tags.tokenizer.tokens("a"))
    assert relative_error(two[:, 0] - empty[:, 0], 2 * (alone[:, 0] - empty[:, 0])) <= 1e-4

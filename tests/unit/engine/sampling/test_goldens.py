"""Sampler for sampler, the engine's latents equal those of the real ComfyUI 0.3.64 on the golden models.

Tolerances are the goldens' own: relative 1e-5, and 1e-4 for runs without added noise on Stable Diffusion.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyfleet.engine.models.open_file import open_all_in_one, open_diffusion
from comfyfleet.engine.nodes.sampling import tonemap_reinhard
from comfyfleet.engine.sampling.noise import initial_noise
from comfyfleet.engine.sampling.sample import sample
from comfyfleet.engine.sampling.samplers import SAMPLERS
from comfyfleet.engine.sampling.schedules import FlowSigmas, cut, schedule
from comfyfleet.engine.values import ConditioningEntry

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[3] / "goldens"
WAN = json.loads((GOLDENS / "wan" / "samplers.json").read_text())
SD15 = json.loads((GOLDENS / "sd15" / "samplers.json").read_text())
ADVANCED = {
    "sd15/advanced": json.loads((GOLDENS / "sd15" / "advanced.json").read_text()),
    "nodes/advanced_flow": json.loads((GOLDENS / "nodes" / "advanced_flow.json").read_text()),
}


@cache
def tensors(name):
    return load_file(GOLDENS / f"{name}.safetensors")


@cache
def wan():
    model = open_diffusion(str(GOLDENS / "models" / "diffusion_models" / WAN["model"]), "cpu")
    return replace(model, sigmas=FlowSigmas(WAN["shift"]))


@cache
def sd15():
    return open_diffusion(str(GOLDENS / "models" / "checkpoints" / "golden_sd15.safetensors"), "cpu")


def prompts(recorded):
    return {
        "positive": (ConditioningEntry(embedding=recorded["positive"]),),
        "negative": (ConditioningEntry(embedding=recorded["negative"]),),
    }


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def sampled(model, table, run, recorded):
    """KSampler as it was recorded: its latent and the number of steps it told."""
    latent = recorded["img2img.latent_in"] if "denoise" in run else torch.zeros(table["latent_shape"])
    steps = []
    sigmas = schedule(
        model.sigmas,
        scheduler=run["scheduler"],
        sampler_name=run["sampler_name"],
        steps=run["steps"],
        denoise=run.get("denoise", 1.0),
    )
    out = sample(
        model,
        noise=initial_noise(latent, table["seed"]),
        latent=latent,
        **prompts(recorded),
        cfg=table["cfg"],
        sampler_name=run["sampler_name"],
        sigmas=sigmas,
        seed=table["seed"],
        callback=lambda step, of, x0, x: steps.append(step),
    )
    return out, len(steps)


def keys(run):
    return run["key"]


def test_the_goldens_name_every_sampler_and_we_have_them_all():
    assert {run["sampler_name"] for run in WAN["runs"]} == set(SAMPLERS)
    assert {run["sampler_name"] for run in SD15["runs"]} == set(SAMPLERS)


@pytest.mark.parametrize("run", WAN["runs"], ids=keys)
def test_each_sampler_equals_the_reference_on_a_flow(run):
    recorded = tensors("wan/samplers")

    latent, steps = sampled(wan(), WAN, run, recorded)

    assert distance(latent, recorded[run["key"]]) < 1e-5
    assert steps == run["callback_count"]


@pytest.mark.parametrize("run", SD15["runs"] + SD15["img2img"], ids=keys)
def test_each_sampler_equals_the_reference_on_stable_diffusion(run):
    recorded = tensors("sd15/samplers")

    latent, steps = sampled(sd15(), SD15, run, recorded)

    assert distance(latent, recorded[run["key"]]) < 1e-5
    assert steps == run.get("callback_count", steps)


@pytest.mark.parametrize(
    ("name", "run"),
    [pytest.param(name, run, id=f"{name}-{run['key']}") for name in ADVANCED for run in ADVANCED[name]["runs"]],
)
def test_parts_of_a_schedule_equal_the_reference(name, run):
    recorded, table = tensors(name), ADVANCED[name]
    model = sd15() if name == "sd15/advanced" else wan()
    latent, adds_noise = recorded[run["latent_in"]], run["add_noise"] == "enable"
    sigmas = cut(
        schedule(model.sigmas, scheduler=table["scheduler"], sampler_name=table["sampler_name"], steps=run["steps"]),
        start=run["start_at_step"],
        end=run["end_at_step"],
        leftover_noise=run["return_with_leftover_noise"] == "enable",
    )

    out = sample(
        model,
        noise=initial_noise(latent, run["noise_seed"]) if adds_noise else torch.zeros_like(latent),
        latent=latent,
        **prompts(recorded),
        cfg=table["cfg"],
        sampler_name=table["sampler_name"],
        sigmas=sigmas,
        seed=run["noise_seed"],
    )

    assert (len(sigmas) > 1) == run["sampler_called"]
    if run["sampler_called"]:
        assert sigmas.tolist() == pytest.approx(run["sigmas"], rel=1e-6)
    assert distance(out, recorded[f"{run['key']}.latent"]) < (1e-5 if adds_noise else 1e-4)


def test_every_step_of_er_sde_on_ace_step_equals_the_reference():
    record = json.loads((GOLDENS / "ace" / "er_sde_steps" / "record.json").read_text())
    recorded, text = tensors("ace/er_sde_steps/record"), tensors("ace/t2m/record")
    model, _, _ = open_all_in_one(str(GOLDENS / "models" / "checkpoints" / "golden_ace_step.safetensors"), "cpu")
    model = replace(
        model,
        sigmas=FlowSigmas(record["shift"]),
        guidance_operations=(lambda latent: tonemap_reinhard(latent, record["mult"]),),
    )
    positive = ConditioningEntry(
        embedding=text["text.positive"], lyric_ids=text["lyric_ids.positive"].reshape(1, -1), lyrics_strength=0.99
    )
    negative = replace(
        positive,
        embedding=torch.zeros_like(positive.embedding),
        lyric_ids=torch.zeros_like(positive.lyric_ids),
    )
    sigmas = schedule(model.sigmas, scheduler="linear_quadratic", sampler_name="er_sde", steps=record["steps"])
    latent = torch.zeros_like(recorded["step_x"][0])
    shown = []

    sample(
        model,
        noise=initial_noise(latent, record["seed"]),
        latent=latent,
        positive=(positive,),
        negative=(negative,),
        cfg=record["cfg"],
        sampler_name="er_sde",
        sigmas=sigmas,
        seed=record["seed"],
        callback=lambda step, of, x0, x: shown.append((x, x0)),
    )

    assert sigmas.tolist() == record["sigmas"]
    assert len(shown) == record["steps"]
    for step, (x, x0) in enumerate(shown):
        assert distance(x, recorded["step_x"][step]) < 1e-5
        assert distance(x0, recorded["step_x0"][step]) < 1e-5

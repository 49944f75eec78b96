"""The sampling nodes: declared as ComfyUI declares them, telling their steps, exact where they were recorded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyfleet.engine.nodes.sampling import NODES, tonemap_reinhard
from comfyfleet.engine.sampling.schedules import FlowSigmas
from comfyfleet.engine.values import Latent

from .analytic import a_model, a_prompt

REINHARD = load_file(Path(__file__).parents[3] / "goldens" / "nodes" / "reinhard.safetensors")
SAMPLER_NAMES = """
    euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 dpm_2 dpm_2_ancestral lms dpm_fast
    dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu dpmpp_2m dpmpp_2m_cfg_pp
    dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm
    ipndm ipndm_v deis res_multistep res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp
    gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece ddim uni_pc
    uni_pc_bh2
"""
SCHEDULER_NAMES = "simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal"
KSAMPLER_INPUTS = "model seed steps cfg sampler_name scheduler positive negative latent_image denoise"
ADVANCED_INPUTS = """
    model add_noise noise_seed steps cfg sampler_name scheduler positive negative latent_image
    start_at_step end_at_step return_with_leftover_noise
"""


class StoppedError(Exception):
    pass


class ARun:
    """A node's surroundings: keeps what progress it was told; stops at a step when asked to."""

    def __init__(self, stop_at=None):
        self.told, self.previews, self.stop_at = [], [], stop_at

    def progress(self, value, maximum, preview=None):
        if value == self.stop_at:
            raise StoppedError
        self.told.append((value, maximum))
        self.previews.append(preview)


def call(node, run=None, **inputs):
    return NODES[node].function(run or ARun(), **inputs)


def ksampler_inputs(**changes):
    return {
        "model": a_model(),
        "seed": 7,
        "steps": 6,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": a_prompt(2.0),
        "negative": a_prompt(-1.0),
        "latent_image": Latent(samples=torch.zeros(1, 4, 6, 6)),
        "denoise": 1.0,
        **changes,
    }


def advanced_inputs(**changes):
    inputs = ksampler_inputs(model=a_model(shift=8.0), steps=8)
    del inputs["seed"], inputs["denoise"]
    own = {
        "noise_seed": 7,
        "add_noise": "enable",
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
    }
    return {**inputs, **own, **changes}


def inputs_of(node):
    return NODES[node].declaration.inputs


def test_the_names_offered_are_comfyui_s_in_comfyui_s_order():
    for node in ("KSampler", "KSamplerAdvanced"):
        assert list(inputs_of(node)["sampler_name"].options) == SAMPLER_NAMES.split()
        assert list(inputs_of(node)["scheduler"].options) == SCHEDULER_NAMES.split()


def test_the_inputs_stand_in_comfyui_s_order_with_its_limits():
    ksampler = inputs_of("KSampler")
    assert list(ksampler) == KSAMPLER_INPUTS.split()
    limits = {name: (i.default, i.minimum, i.maximum) for name, i in ksampler.items() if i.minimum is not None}
    assert limits == {
        "seed": (0, 0, 18446744073709551615),
        "steps": (20, 1, 10000),
        "cfg": (8.0, 0.0, 100.0),
        "denoise": (1.0, 0.0, 1.0),
    }
    assert list(inputs_of("KSamplerAdvanced")) == ADVANCED_INPUTS.split()
    assert list(inputs_of("KSamplerAdvanced")["return_with_leftover_noise"].options) == ["disable", "enable"]


def test_a_ksampler_tells_every_step_and_offers_a_preview_of_it():
    run = ARun()

    (latent,) = call("KSampler", run, **ksampler_inputs())

    assert run.told == [(step, 6) for step in range(1, 7)]
    assert run.previews[0]().shape == (1, 6, 6, 3)
    assert latent.samples.shape == (1, 4, 6, 6)


def test_a_ksampler_stops_where_its_run_was_stopped():
    inputs = ksampler_inputs()

    with pytest.raises(StoppedError):
        call("KSampler", ARun(stop_at=3), **inputs)

    assert len(inputs["model"].network.calls) == 3


def test_a_ksampler_leaves_its_input_as_it_was_and_keeps_what_travels_with_it():
    mask = torch.ones(1, 6, 6)
    picture = Latent(samples=torch.full((2, 4, 6, 6), 0.5), noise_mask=mask, batch_index=(3, 3))

    (out,) = call("KSampler", **ksampler_inputs(latent_image=picture, denoise=0.5))

    assert torch.equal(picture.samples, torch.full((2, 4, 6, 6), 0.5))
    assert out.noise_mask is mask
    assert out.batch_index == (3, 3)
    assert torch.equal(out.samples[0], out.samples[1])  # equal batch indices share their noise


def test_two_advanced_samplers_hand_over_as_one_would_have_run():
    (whole,) = call("KSamplerAdvanced", **advanced_inputs())

    (first,) = call("KSamplerAdvanced", **advanced_inputs(end_at_step=4, return_with_leftover_noise="enable"))
    (second,) = call(
        "KSamplerAdvanced",
        **advanced_inputs(latent_image=first, start_at_step=4, add_noise="disable", noise_seed=0),
    )

    assert torch.allclose(second.samples, whole.samples, atol=1e-4)
    assert not torch.allclose(first.samples, whole.samples, atol=1e-2)


def test_an_advanced_sampler_beyond_the_last_step_gives_the_latent_back():
    picture = Latent(samples=torch.full((1, 4, 6, 6), 0.5))

    (out,) = call("KSamplerAdvanced", **advanced_inputs(latent_image=picture, start_at_step=8))

    assert torch.equal(out.samples, picture.samples)


def test_model_nodes_give_a_changed_copy():
    model = a_model("epsilon")
    (operation,) = call("LatentOperationTonemapReinhard", multiplier=1.15)

    (shifted,) = call("ModelSamplingSD3", model=model, shift=6.0)
    (toned,) = call("LatentApplyOperationCFG", model=shifted, operation=operation)

    assert torch.equal(shifted.sigmas.sigmas, FlowSigmas(6.0).sigmas)
    assert shifted.prediction == "flow"
    assert toned == replace(shifted, guidance_operations=(operation,))
    assert model.prediction == "epsilon"
    assert model.guidance_operations == ()


@pytest.mark.parametrize("key", sorted(k for k in REINHARD if ".out." in k))
def test_the_tonemap_equals_the_reference(key):
    kind, multiplier = key.split(".out.")

    out = tonemap_reinhard(REINHARD[f"{kind}.in"], float(multiplier))

    assert float((out - REINHARD[key]).norm() / REINHARD[key].norm()) < 1e-6


def test_a_tonemap_multiplier_of_zero_takes_all_away_and_makes_no_nan():
    assert torch.equal(tonemap_reinhard(REINHARD["image.in"], 0.0), torch.zeros_like(REINHARD["image.in"]))

"""The noise levels equal the reference's: bit for bit where promised, within 1e-6 elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from comfyfleet.engine.sampling.schedules import SCHEDULERS, FlowSigmas, ScaledLinearSigmas, cut, schedule

GOLDENS = Path(__file__).parents[3] / "goldens"
FLOW = json.loads((GOLDENS / "nodes" / "flow_sigmas.json").read_text())
SD15 = json.loads((GOLDENS / "sd15" / "schedulers.json").read_text())
BIT_EXACT = {"simple", "linear_quadratic"}


def tables():
    for shift, by_scheduler in FLOW["tables"].items():
        for scheduler, by_steps in by_scheduler.items():
            for steps, sigmas in by_steps.items():
                yield pytest.param(float(shift), scheduler, int(steps), sigmas, id=f"flow{shift}-{scheduler}-{steps}")
    for scheduler, by_steps in SD15["tables"].items():
        for steps, sigmas in by_steps.items():
            yield pytest.param(None, scheduler, int(steps), sigmas, id=f"sd15-{scheduler}-{steps}")


def table_of(shift):
    return ScaledLinearSigmas() if shift is None else FlowSigmas(shift)


@pytest.mark.parametrize(("shift", "scheduler", "steps", "expected"), list(tables()))
def test_every_scheduler_gives_the_reference_sigmas(shift, scheduler, steps, expected):
    sigmas = SCHEDULERS[scheduler](table_of(shift), steps)

    assert sigmas.dtype == torch.float32
    if scheduler in BIT_EXACT:
        assert sigmas.tolist() == expected
    else:
        assert sigmas.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_training_table_of_stable_diffusion_is_the_reference_one():
    expected = load_file(GOLDENS / "sd15" / "schedulers.safetensors")["sigma_table"]

    assert torch.equal(ScaledLinearSigmas().sigmas, expected)


@pytest.mark.parametrize("case", SD15["ksampler_tables"], ids=lambda c: f"{c['sampler_name']}-{c['denoise']}")
def test_a_partial_denoise_and_look_ahead_samplers_get_the_reference_sigmas(case):
    sigmas = schedule(
        ScaledLinearSigmas(),
        scheduler=case["scheduler"],
        sampler_name=case["sampler_name"],
        steps=case["steps"],
        denoise=case["denoise"],
    )

    assert sigmas.tolist() == pytest.approx(case["sigmas"], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("shift", FLOW["model_sampling"])
def test_a_flow_knows_its_range_its_timesteps_and_its_percents(shift):
    table, expected = FlowSigmas(float(shift)), FLOW["model_sampling"][shift]

    assert float(table.sigmas[0]) == expected["sigma_min"]
    assert float(table.sigmas[-1]) == expected["sigma_max"]
    assert float(table.timestep(torch.tensor(0.5))) == expected["timestep_of_sigma_0.5"]
    for percent, sigma in expected["percent_to_sigma"].items():
        assert table.percent_to_sigma(float(percent)) == pytest.approx(sigma, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    steps=st.integers(1, 1000),
    shift=st.one_of(st.none(), st.floats(0.1, 100.0)),
)
def test_any_schedule_falls_and_ends_at_zero(scheduler, steps, shift):
    sigmas = SCHEDULERS[scheduler](table_of(shift), steps)

    assert torch.isfinite(sigmas).all()
    assert (sigmas[1:] <= sigmas[:-1]).all()
    assert sigmas[-1] == 0
    assert len(sigmas) >= 2


@given(steps=st.integers(1, 60), start=st.integers(0, 70), end=st.integers(0, 70), leftover=st.booleans())
def test_two_cuts_share_their_meeting_point(steps, start, end, leftover):
    whole = schedule(FlowSigmas(8.0), scheduler="simple", sampler_name="euler", steps=steps)

    part = cut(whole, start=start, end=end, leftover_noise=leftover)

    if start >= min(end, steps):
        assert len(part) < 2
    else:
        expected = whole[start : end + 1].clone()
        if not leftover:
            expected[-1] = 0
        assert torch.equal(part, expected)


def test_a_denoise_of_zero_has_nothing_to_walk():
    assert len(schedule(FlowSigmas(3.0), scheduler="simple", sampler_name="euler", steps=9, denoise=0.0)) == 0


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_leaves_no_noise_levels_is_refused(shift):
    with pytest.raises(ValueError, match="must be above 0"):
        FlowSigmas(shift)

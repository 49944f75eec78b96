"""A whole sampler run: it reaches what the exact answer is, keeps what a mask keeps, stops where it is told."""

from functools import partial

import pytest
import torch

from comfyfleet.engine.sampling.noise import initial_noise
from comfyfleet.engine.sampling.sample import fitted, sample
from comfyfleet.engine.sampling.samplers import SAMPLERS
from comfyfleet.engine.sampling.schedules import schedule

from .analytic import Scaled, a_model, a_prompt

EMPTY = torch.zeros(2, 4, 6, 6)


def a_run(model, *, steps=20, sampler_name="euler", scheduler="simple", latent=EMPTY, seed=1, cfg=1.0, **options):
    sigmas = options.pop("sigmas", None)
    if sigmas is None:
        denoise = options.pop("denoise", 1.0)
        sigmas = schedule(model.sigmas, scheduler=scheduler, sampler_name=sampler_name, steps=steps, denoise=denoise)
    return sample(
        model,
        noise=options.pop("noise", initial_noise(latent, seed)),
        latent=latent,
        positive=options.pop("positive", a_prompt(2.0)),
        negative=options.pop("negative", a_prompt(-1.0)),
        cfg=cfg,
        sampler_name=sampler_name,
        sigmas=sigmas,
        seed=seed,
        **options,
    )


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_euler_comes_closer_to_the_exact_answer_with_more_steps(prediction):
    model = a_model(prediction)
    # A flow starts at pure noise; the other starts at sigma 14.6, where a little of the spread is left.
    scale = 1.0 if prediction == "flow" else (1 + 14.6146**2) ** 0.5 / (14.6146**2 + 0.25) ** 0.5
    mean_kept = 0.0 if prediction == "flow" else -2.0 / (14.6146**2 + 0.25) ** 0.5
    exact = 2.0 + 0.5 * (scale * initial_noise(EMPTY, 1) + mean_kept)

    errors = [float((a_run(model, steps=steps) - exact).abs().max()) for steps in (10, 40, 160)]

    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
@pytest.mark.parametrize("sampler_name", ["er_sde"])
def test_a_stochastic_sampler_ends_with_the_data_s_own_mean_and_spread(prediction, sampler_name):
    latent = torch.zeros(1, 4, 64, 64)

    out = a_run(a_model(prediction), steps=60, sampler_name=sampler_name, latent=latent)

    assert float(out.mean()) == pytest.approx(2.0, abs=0.06)
    assert float(out.std()) == pytest.approx(0.5, abs=0.06)


def test_guidance_of_one_never_runs_the_negative_prompt():
    model = a_model()
    a_run(model, steps=3, cfg=1.0)

    assert {float(entry.embedding[0, 0, 0]) for _, _, entry in model.network.calls} == {2.0}
    assert len(model.network.calls) == 3


def test_prompts_of_equal_shape_share_one_forward_and_one_conditioning_object():
    model = a_model()
    a_run(model, steps=3, cfg=4.0)

    assert [batch for batch, _, _ in model.network.calls] == [4, 4, 4]
    assert len({id(entry) for _, _, entry in model.network.calls}) == 1


def test_prompts_of_unequal_shape_run_one_after_the_other_with_the_same_result():
    joined = a_run(a_model(), cfg=4.0)
    apart_model = a_model()
    apart = a_run(apart_model, cfg=4.0, negative=a_prompt(-1.0, tokens=3))

    assert {batch for batch, _, _ in apart_model.network.calls} == {2}
    assert torch.allclose(joined, apart, atol=1e-5)


def test_combined_prompts_count_equally():
    both = a_run(a_model(), positive=a_prompt(1.0) + a_prompt(3.0))

    assert torch.allclose(both, a_run(a_model(), positive=a_prompt(2.0)), atol=1e-5)


def test_an_empty_latent_is_not_scaled_and_a_picture_is():
    picture = torch.full((1, 4, 6, 6), 3.0)
    model = a_model(latent_format=Scaled())
    nothing_to_take_away = torch.tensor([0.2, 0.2])

    kept = a_run(model, latent=picture, noise=torch.zeros_like(picture), sigmas=nothing_to_take_away)
    empty = a_run(model, latent=picture * 0, noise=torch.zeros_like(picture), sigmas=nothing_to_take_away)

    assert torch.allclose(kept, picture, atol=1e-5)
    assert torch.allclose(empty, torch.full_like(picture, -0.5), atol=1e-5)  # zero stayed zero going in


def test_a_mask_keeps_the_picture_where_it_is_zero():
    picture = torch.linspace(-1, 1, 144).reshape(1, 4, 6, 6)
    mask = torch.zeros(1, 6, 6)
    mask[:, :, 3:] = 1.0

    for sampler_name in ("euler", "ddim"):
        out = a_run(a_model(), latent=picture, noise_mask=mask, sampler_name=sampler_name)

        assert torch.allclose(out[..., :3], picture[..., :3], atol=1e-5)
        assert not torch.allclose(out[..., 3:], picture[..., 3:], atol=0.1)


def test_nothing_to_walk_gives_the_latent_back():
    picture = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    model = a_model()

    assert torch.equal(a_run(model, latent=picture, sigmas=torch.zeros(0)), picture)
    assert model.network.calls == []


def test_a_run_is_stopped_between_two_steps_and_the_network_is_told_that_it_ended():
    model = a_model()

    class StoppedError(Exception):
        pass

    def stop_at_third(step, steps, x0, x):
        assert steps == 20
        if step == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        a_run(model, callback=stop_at_third)

    assert len(model.network.calls) == 3
    assert model.network.ended == 1


def test_two_parts_of_a_flow_meet_as_if_they_were_one_run():
    model = a_model(shift=8.0)
    whole = schedule(model.sigmas, scheduler="simple", sampler_name="euler", steps=8)

    first = a_run(model, sigmas=whole[:5], cfg=3.5)
    second = a_run(model, latent=first, noise=torch.zeros_like(first), sigmas=whole[4:], cfg=3.5)

    assert torch.allclose(second, a_run(model, sigmas=whole, cfg=3.5), atol=1e-4)


def test_a_guidance_operation_works_on_the_difference_or_at_scale_one_on_the_prediction():
    from dataclasses import replace

    halving = replace(a_model(), guidance_operations=(lambda latent: latent * 0.5,))

    guided = a_run(halving, cfg=4.0)
    assert torch.allclose(guided, a_run(a_model(), cfg=2.0), atol=1e-5)

    alone = a_run(halving, cfg=1.0, steps=1, sigmas=torch.tensor([1.0, 0.0]))
    assert torch.allclose(alone, torch.full_like(alone, 1.0), atol=1e-5)


# The reference walks these as if a flow were variance-exploding; their answer on a flow is its own.
NOT_MADE_FOR_FLOWS = {
    "ddpm",
    "dpmpp_2s_ancestral_cfg_pp",
    "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp",
}
# These need two different positive sigmas, or two steps, to move at all.
NOT_MADE_FOR_ONE_STEP = {"dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2"}


@pytest.mark.parametrize(
    ("sampler_name", "prediction"),
    [(name, "epsilon") for name in sorted(SAMPLERS)]
    + [(name, "flow") for name in sorted(set(SAMPLERS) - NOT_MADE_FOR_FLOWS)],
)
def test_every_sampler_ends_at_the_data_and_repeats_itself(sampler_name, prediction):
    latent = torch.zeros(1, 4, 16, 16)
    one_prompt = {"positive": a_prompt(2.0), "negative": a_prompt(2.0)}
    run = partial(a_run, steps=24, sampler_name=sampler_name, latent=latent, **one_prompt)

    out = run(a_model(prediction, shift=1.0))

    assert float(out.mean()) == pytest.approx(2.0, abs=0.12)
    assert 0.3 < float(out.std()) < 0.75
    assert torch.equal(out, run(a_model(prediction, shift=1.0)))


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
@pytest.mark.parametrize("sampler_name", sorted(set(SAMPLERS) - NOT_MADE_FOR_ONE_STEP))
def test_a_single_step_is_the_network_s_own_guess(prediction, sampler_name):
    out = a_run(a_model(prediction), steps=1, sampler_name=sampler_name, seed=5)

    assert torch.isfinite(out).all()
    assert float(out.mean()) == pytest.approx(2.0, abs=0.1)


class FilmFormat(Scaled):
    channels, axes = 16, 3


def test_an_empty_picture_latent_becomes_a_film_of_one_frame_with_the_model_s_channels():
    model = a_model(latent_format=FilmFormat())

    assert fitted(model, torch.zeros(2, 4, 6, 8)).shape == (2, 16, 1, 6, 8)
    assert fitted(model, torch.ones(1, 16, 6, 8)).shape == (1, 16, 1, 6, 8)
    film = torch.ones(1, 16, 3, 6, 8)
    assert fitted(model, film) is film


@pytest.mark.parametrize(
    ("latent_format", "shape"), [(FilmFormat(), (1, 4, 6, 8)), (Scaled(), (1, 16, 6, 8)), (Scaled(), (1, 4, 2, 6, 8))]
)
def test_a_latent_of_another_family_is_refused_with_both_shapes(latent_format, shape):
    with pytest.raises(ValueError, match=r"another model family: a test model takes \d+ channels"):
        fitted(a_model(latent_format=latent_format), torch.ones(shape))


@pytest.mark.parametrize("sampler_name", ["sa_solver", "sa_solver_pece"])
def test_a_cut_stochastic_adams_run_gives_its_last_corrected_state_as_comfyui_does(sampler_name):
    model = a_model("epsilon")
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    # One step that does not reach 0: only a prediction follows the entry, and a prediction is not given back.
    cut = sample(
        model,
        noise=noise,
        latent=torch.zeros_like(noise),
        positive=a_prompt(1.0),
        negative=a_prompt(0.0),
        cfg=1.0,
        sampler_name=sampler_name,
        sigmas=torch.tensor([5.0, 3.0]),
        seed=1,
    )

    assert torch.allclose(cut, noise * 5.0)

"""Nodes that sample, and nodes that change how a model is sampled.

Declarations and thin functions: the mathematics is in `engine/sampling/`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from comfyfleet.engine.registry import NodeRegistry, NodeRun, choice, integer, link, real
from comfyfleet.engine.sampling.noise import initial_noise
from comfyfleet.engine.sampling.preview import has_preview, preview
from comfyfleet.engine.sampling.sample import StepCallback, fitted, sample
from comfyfleet.engine.sampling.samplers import SAMPLERS
from comfyfleet.engine.sampling.schedules import SCHEDULERS, FlowSigmas, cut, schedule
from comfyfleet.engine.values import Conditioning, DiffusionModel, Latent, LatentOperation

NODES = NodeRegistry()

MAX_SEED = 2**64 - 1


@NODES.node(
    "KSampler",
    inputs={
        "model": link("MODEL", tooltip="The diffusion model."),
        "seed": integer(0, 0, MAX_SEED, control_after_generate=True),
        "steps": integer(20, 1, 10000),
        "cfg": real(8.0, 0.0, 100.0, step=0.1, round=0.01),
        "sampler_name": choice(list(SAMPLERS), tooltip="How each step is taken."),
        "scheduler": choice(list(SCHEDULERS), tooltip="How the noise falls over the steps."),
        "positive": link("CONDITIONING", tooltip="What the picture should show."),
        "negative": link("CONDITIONING", tooltip="What it should not."),
        "latent_image": link("LATENT", tooltip="Where to start: empty, or a picture to change."),
        "denoise": real(1.0, 0.0, 1.0, step=0.01),
    },
    outputs=["LATENT"],
    category="sampling",
    description="Denoises a latent: away from the negative prompt, towards the positive one.",
)
def ksampler(
    run: NodeRun,
    *,
    model: DiffusionModel,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    denoise: float,
) -> tuple[Latent]:
    """Denoise a latent by `steps` steps; `denoise` below 1 starts from the latent instead of from pure noise."""
    sigmas = schedule(model.sigmas, scheduler=scheduler, sampler_name=sampler_name, steps=steps, denoise=denoise)
    latent_image = replace(latent_image, samples=fitted(model, latent_image.samples))
    noise = initial_noise(latent_image.samples, seed, latent_image.batch_index)
    samples = sample(
        model,
        noise=noise,
        latent=latent_image.samples,
        positive=positive,
        negative=negative,
        cfg=cfg,
        sampler_name=sampler_name,
        sigmas=sigmas,
        seed=seed,
        callback=_teller(run, model),
        noise_mask=latent_image.noise_mask,
    )
    return (replace(latent_image, samples=samples),)


@NODES.node(
    "KSamplerAdvanced",
    inputs={
        "model": link("MODEL"),
        "add_noise": choice(["enable", "disable"]),
        "noise_seed": integer(0, 0, MAX_SEED, control_after_generate=True),
        "steps": integer(20, 1, 10000),
        "cfg": real(8.0, 0.0, 100.0, step=0.1, round=0.01),
        "sampler_name": choice(list(SAMPLERS)),
        "scheduler": choice(list(SCHEDULERS)),
        "positive": link("CONDITIONING"),
        "negative": link("CONDITIONING"),
        "latent_image": link("LATENT"),
        "start_at_step": integer(0, 0, 10000),
        "end_at_step": integer(10000, 0, 10000),
        "return_with_leftover_noise": choice(["disable", "enable"]),
    },
    outputs=["LATENT"],
    category="sampling",
    display_name="KSampler (Advanced)",
)
def ksampler_advanced(
    run: NodeRun,
    *,
    model: DiffusionModel,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
) -> tuple[Latent]:
    """A part of a schedule: from step `start_at_step` to `end_at_step`, so that two models can share one."""
    sigmas = cut(
        schedule(model.sigmas, scheduler=scheduler, sampler_name=sampler_name, steps=steps),
        start=start_at_step,
        end=end_at_step,
        leftover_noise=return_with_leftover_noise == "enable",
    )
    latent_image = replace(latent_image, samples=fitted(model, latent_image.samples))
    if add_noise == "enable":
        noise = initial_noise(latent_image.samples, noise_seed, latent_image.batch_index)
    else:
        # Zero noise, not none: a flow's entry then scales the latent by 1 - sigma, undoing the former part's exit.
        noise = torch.zeros_like(latent_image.samples)
    samples = sample(
        model,
        noise=noise,
        latent=latent_image.samples,
        positive=positive,
        negative=negative,
        cfg=cfg,
        sampler_name=sampler_name,
        sigmas=sigmas,
        seed=noise_seed,
        callback=_teller(run, model),
        noise_mask=latent_image.noise_mask,
    )
    return (replace(latent_image, samples=samples),)


@NODES.node(
    "ModelSamplingSD3",
    inputs={"model": link("MODEL"), "shift": real(3.0, 0.0, 100.0, step=0.01)},
    outputs=["MODEL"],
    category="advanced/model",
)
def model_sampling_sd3(run: NodeRun, *, model: DiffusionModel, shift: float) -> tuple[DiffusionModel]:
    """Sample the model as a flow whose table is shifted by `shift`: higher spends more steps at high noise."""
    return (replace(model, sigmas=FlowSigmas(shift), prediction="flow"),)


@NODES.node(
    "LatentApplyOperationCFG",
    inputs={"model": link("MODEL"), "operation": link("LATENT_OPERATION")},
    outputs=["MODEL"],
    category="latent/advanced/operations",
)
def latent_apply_operation_cfg(
    run: NodeRun, *, model: DiffusionModel, operation: LatentOperation
) -> tuple[DiffusionModel]:
    """Apply an operation to the difference between the prompts' predictions, before guidance scales it."""
    return (replace(model, guidance_operations=(*model.guidance_operations, operation)),)


@NODES.node(
    "LatentOperationTonemapReinhard",
    inputs={"multiplier": real(1.0, 0.0, 100.0, step=0.01)},
    outputs=["LATENT_OPERATION"],
    category="latent/advanced/operations",
)
def latent_operation_tonemap_reinhard(run: NodeRun, *, multiplier: float) -> tuple[LatentOperation]:
    """Compress latents' strong values, so that high guidance does not burn."""

    def tonemap(latent: Tensor) -> Tensor:
        return tonemap_reinhard(latent, multiplier)

    return (tonemap,)


def tonemap_reinhard(latent: Tensor, multiplier: float) -> Tensor:
    """Reinhard's curve on each position's channel norm r: r' = top r / (top + r); the direction is kept.

    latent: (B, C, …). top = (mean + 5 std of r) x multiplier, per item, over r's axes 1 to 3 only: in a film each
    column (axis 4) has its own. Source: Reinhard et al. 2002, eq. 3.
    """
    norm = torch.linalg.vector_norm(latent, dim=1, keepdim=True) + 1e-10
    top = (norm.mean(dim=(1, 2, 3), keepdim=True) + 5 * norm.std(dim=(1, 2, 3), keepdim=True)) * multiplier
    return latent * (top / (top + norm))


def _teller(run: NodeRun, model: DiffusionModel) -> StepCallback:
    """Tells each step to the node's run, which stops the sampler there when it was interrupted."""
    is_visible = has_preview(model)

    def tell(step: int, steps: int, x0: Tensor, _x: Tensor) -> None:
        run.progress(step + 1, steps, (lambda: preview(model, x0)) if is_visible else None)

    return tell

"""No sampler makes the host wait for the device, nor mixes tensors of two devices.

PyTorch's meta device stands in for a GPU: like one it takes 0-dim CPU tensors as factors and refuses other CPU tensors;
unlike one it has no values at all, so whatever would read one back, and wait for it, fails here.
"""

from dataclasses import replace

import pytest
import torch

from comfyfleet.engine.sampling.guidance import Guide
from comfyfleet.engine.sampling.run import SamplerRun
from comfyfleet.engine.sampling.samplers import SAMPLERS
from comfyfleet.engine.sampling.schedules import schedule
from comfyfleet.engine.values import ConditioningEntry

from .analytic import a_model

# The adaptive one must look at its error; the others here draw a Brownian path on the device, as their CPU twins do.
READS_BACK = {"dpm_adaptive"}
DRAWS_A_PATH_THERE = {name for name in SAMPLERS if name.endswith("_gpu")}


class MetaNetwork:
    key, size_bytes, device = "meta", 0, "meta"

    def forward(self, x, timestep, conditioning):
        assert {x.device.type, timestep.device.type, conditioning.embedding.device.type} == {"meta"}
        return x


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
@pytest.mark.parametrize("sampler_name", sorted(set(SAMPLERS) - READS_BACK - DRAWS_A_PATH_THERE))
def test_a_sampler_runs_without_looking_at_the_device_s_values(prediction, sampler_name):
    model = replace(a_model(prediction), network=MetaNetwork())
    x = torch.zeros(1, 4, 6, 6, device="meta")
    prompt = (ConditioningEntry(embedding=torch.zeros(1, 2, 3, device="meta")),)
    guide = Guide(model, positive=prompt, negative=prompt, scale=3.0, noise=x)
    run = SamplerRun(
        denoise=guide,
        denoise_pair=guide.pair,
        sigmas=schedule(model.sigmas, scheduler="simple", sampler_name=sampler_name, steps=6),
        table=model.sigmas,
        is_flow=prediction == "flow",
        seed=1,
        noise=lambda sigma, sigma_next: torch.zeros_like(x),
        on_step=lambda step, x, x0: None,
    )

    out = SAMPLERS[sampler_name](run, x)

    assert out.device.type == "meta"
    assert out.shape == x.shape

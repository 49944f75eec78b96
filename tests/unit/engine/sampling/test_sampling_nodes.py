"""The sampling nodes: declared as ComfyUI declares them, and exact where the reference recorded them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyfleet.engine.nodes.sampling import NODES, tonemap_reinhard

REINHARD = load_file(Path(__file__).parents[3] / "goldens" / "nodes" / "reinhard.safetensors")


@pytest.mark.parametrize("key", sorted(k for k in REINHARD if ".out." in k))
def test_the_tonemap_equals_the_reference(key):
    kind, multiplier = key.split(".out.")

    out = tonemap_reinhard(REINHARD[f"{kind}.in"], float(multiplier))

    assert float((out - REINHARD[key]).norm() / REINHARD[key].norm()) < 1e-6


def test_a_tonemap_multiplier_of_zero_takes_all_away_and_makes_no_nan():
    assert torch.equal(tonemap_reinhard(REINHARD["image.in"], 0.0), torch.zeros_like(REINHARD["image.in"]))


def test_the_nodes_of_this_module_are_these():
    assert NODES.names() == [
        "KSampler",
        "KSamplerAdvanced",
        "LatentApplyOperationCFG",
        "LatentOperationTonemapReinhard",
        "ModelSamplingSD3",
    ]

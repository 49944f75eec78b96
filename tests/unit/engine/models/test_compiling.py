"""Compiled blocks give what plain ones give, in one piece and with one compilation for all blocks of a network.

The backend here needs neither a C compiler nor a GPU: what is proved is that the blocks can be compiled whole.
"""

import pytest
import torch

from comfyfleet.engine.memory import Residency
from comfyfleet.engine.models.ace import load
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.compiling import compile_blocks
from comfyfleet.engine.models.open_file import open_diffusion
from comfyfleet.engine.values import ConditioningEntry
from engine_ace import CHECKPOINT
from engine_goldens import GOLDENS, relative_error, tensors

BACKEND = "aot_eager"

pytestmark = [
    pytest.mark.slow,  # the compiler's import alone takes seconds
    pytest.mark.filterwarnings("ignore"),  # its own, about itself
]


def test_ace_step_computes_the_same_when_compiled():
    given = tensors("ace/given_ids/record")
    prompt = ConditioningEntry(embedding=given["text"], lyric_ids=given["lyric_ids"], lyrics_strength=0.8)
    network = load(open_checkpoint(CHECKPOINT))[0].network

    Residency("cpu", 1 << 40, BACKEND).use(network)
    velocity = network.forward(given["forward.x"], given["forward.timestep"], prompt)

    assert all(block._compiled_call_impl is not None for block in network.network().transformer_blocks)
    assert relative_error(velocity, given["forward.output"]) <= 1e-5


@pytest.mark.parametrize("file", ["golden_wan_high", "golden_wan_low_fp8_scaled"])
def test_wan_computes_the_same_when_compiled(file):
    path = str(GOLDENS / "models" / "diffusion_models" / f"{file}.safetensors")
    plain, compiled = open_diffusion(path, "cpu").network, open_diffusion(path, "cpu").network
    dice = torch.Generator().manual_seed(1)
    x, time = torch.randn(1, 16, 2, 8, 8, generator=dice), torch.tensor([700.0])
    prompt = ConditioningEntry(embedding=torch.randn(1, 512, 32, generator=dice))

    compiled.compile_with(BACKEND)

    assert relative_error(compiled.forward(x, time, prompt), plain.forward(x, time, prompt)) <= 1e-5


def test_a_network_without_repetition_is_left_alone():

    assert compile_blocks(torch.nn.Linear(2, 2), BACKEND) == 0

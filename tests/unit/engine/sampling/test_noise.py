"""The initial noise is the reference's, bit for bit, for every kind of seed and for re-used batch items."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyfleet.engine.sampling.noise import brownian_noise, device_noise, initial_noise

NOISE = load_file(Path(__file__).parents[3] / "goldens" / "nodes" / "noise.safetensors")


@pytest.mark.parametrize("key", sorted(k for k in NOISE if not k.endswith("batch_index")))
def test_a_seed_gives_the_reference_noise(key):
    expected = NOISE[key]

    assert torch.equal(initial_noise(torch.zeros_like(expected), int(key.split(".")[0])), expected)


def test_items_of_equal_batch_index_share_their_noise():
    expected = NOISE["0.batch_index"]

    noise = initial_noise(torch.zeros_like(expected), 0, (0, 0, 3))

    assert torch.equal(noise, expected)
    assert torch.equal(noise[0], noise[1])


def test_the_first_noise_on_the_way_equals_the_initial_noise_on_a_cpu():
    x = torch.zeros(1, 4, 3, 3)
    source = device_noise(x, 7)
    first = source(torch.tensor(1.0), torch.tensor(0.5))

    assert torch.equal(first, initial_noise(x, 7))
    assert not torch.equal(source(torch.tensor(0.5), torch.tensor(0.2)), first)


def test_a_brownian_path_has_unit_increments_that_add_up():
    sigmas = torch.tensor([10.0, 4.0, 1.0, 0.0])
    noise = brownian_noise(torch.zeros(1, 4, 64, 64), sigmas, seed=3, on_cpu=True)

    whole = noise(sigmas[0], sigmas[2]) * 9**0.5
    halves = noise(sigmas[0], sigmas[1]) * 6**0.5 + noise(sigmas[1], sigmas[2]) * 3**0.5

    assert torch.allclose(whole, halves, atol=1e-4)
    assert float(noise(sigmas[0], sigmas[1]).std()) == pytest.approx(1.0, abs=0.05)

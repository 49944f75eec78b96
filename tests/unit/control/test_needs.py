"""What a workergroup's search asks of a machine, and which machines fit."""

from __future__ import annotations

import pytest

from comfyfleet.control.fleet.base import FleetNode
from comfyfleet.control.fleet.needs import gpu_ram_wanted, gpus_wanted, is_fit
from comfyfleet.control.search import parse_search

NODE = FleetNode(
    name="n1",
    address="10.0.0.5",
    is_alive=True,
    gpus=2,
    gpu_name="RTX_4090",
    gpu_ram_gb=24,
    price_hour=0.4,
    labels={"region": "eu-north", "verified": "true", "inet_down": "800"},
)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        ("gpu_ram>=24 num_gpus=1 gpu_name=RTX_4090 dph_total<0.5", True),
        ("gpu_ram>24", False),
        ("gpu_name='RTX 4090'", True),
        ("gpu_name in [RTX_3090,RTX_4090]", True),
        ("gpu_name notin [RTX_4090]", False),
        ("gpu_name!=RTX_4090", False),
        ("num_gpus=2", True),
        ("num_gpus>=4", False),
        ("dph_total<=0.39", False),
        ("region=eu_north", True),
        ("verified=true", True),
        ("verified=false", False),
        ("inet_down>=500", True),
        ("inet_down>=1000", False),
        ("reliability>0.9", True),
        ("gpu_name=any", True),
    ],
)
def test_a_node_fits_what_the_search_says_of_what_is_known_of_it(text, fits):
    assert is_fit(parse_search(text), NODE) is fits


def test_a_node_without_a_price_is_no_bargain():
    unpriced = FleetNode(name="n2", address="", is_alive=True, gpus=8)

    assert not is_fit(parse_search("dph_total<0.5"), unpriced)
    assert is_fit(parse_search("gpu_ram>=24"), unpriced), "of what nobody said, nothing is held against it"


@pytest.mark.parametrize(
    ("text", "gpus", "ram"),
    [("", 1, 0), ("gpu_ram>=24", 1, 24), ("num_gpus in [4,2]", 2, 0), ("num_gpus>=2 gpu_ram=48", 2, 48)],
)
def test_the_least_that_the_search_allows_is_what_is_reserved(text, gpus, ram):
    assert (gpus_wanted(parse_search(text)), gpu_ram_wanted(parse_search(text))) == (gpus, ram)

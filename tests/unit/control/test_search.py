"""search_params: the text form, and what cannot be read."""

from __future__ import annotations

import pytest

from comfyfleet.control.search import parse_search
from comfyfleet.wire.errors import InvalidArguments


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("", {}),
        (
            "verified=True rentable=True rented=False",
            {"verified": {"eq": True}, "rentable": {"eq": True}, "rented": {"eq": False}},
        ),
        ("gpu_ram>=24 dph<0.5", {"gpu_ram": {"gte": 24}, "dph": {"lt": 0.5}}),
        ("gpu_name=RTX_4090", {"gpu_name": {"eq": "RTX 4090"}}),
        ('gpu_name in ["RTX 4090", A100]', {"gpu_name": {"in": ["RTX 4090", "A100"]}}),
        ("geolocation notin [CN,VN]", {"geolocation": {"notin": ["CN", "VN"]}}),
        ("num_gpus > 1 num_gpus <= 4", {"num_gpus": {"gt": 1, "lte": 4}}),
        ("verified=any", {}),
    ],
)
def test_text_becomes_a_query(text, query):
    assert parse_search(text) == query


def test_what_cannot_be_read_is_shown():
    with pytest.raises(InvalidArguments, match="gpu ram"):
        parse_search("num_gpus=1 gpu ram 24")

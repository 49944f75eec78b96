"""A fleet seen as a market: what is offered is what a workergroup with that search would start workers on."""

from __future__ import annotations

import pytest

from comfyfleet.control.catalog import Catalog
from comfyfleet.control.fleet.base import FleetNode
from comfyfleet.control.market import asked, benchmarks, offers, template_rows
from comfyfleet.control.records import Template, Workergroup
from comfyfleet.control.worker import Worker

# As `vastai run benchmarks` asks.
DEFAULTS = {"verified": {"eq": True}, "external": {"eq": False}, "rentable": {"eq": True}, "rented": {"eq": False}}
NODE = FleetNode(
    name="attic",
    address="10.0.0.1",
    is_alive=True,
    gpus=4,
    free_gpus=4,
    gpu_name="NVIDIA GeForce RTX 4090",
    gpu_ram_gb=24.0,
    price_hour=2.0,
)


def found(node: FleetNode = NODE, **clauses):
    return offers([node], asked({**DEFAULTS, **clauses, "order": [["score", "desc"]], "type": "on-demand"}))


def test_a_machine_is_offered_with_as_many_cards_as_are_asked_for_at_their_price():
    (offer,) = found(gpu_name={"eq": "RTX 4090"}, num_gpus={"eq": 2})

    assert (offer["num_gpus"], offer["gpu_ram"], offer["gpu_total_ram"]) == (2, 24000, 48000)
    assert offer["dph_total"] == 1.0


@pytest.mark.parametrize(
    "clauses",
    [
        {"gpu_name": {"eq": "RTX 3090"}},
        {"num_gpus": {"eq": 8}},
        {"gpu_ram": {"gte": 48000}},
        {"num_gpus": {"eq": 1}, "gpu_total_ram": {"gte": 48000}},
        {"dph_total": {"lte": 0.1}},
    ],
)
def test_a_machine_that_is_not_what_is_searched_for_is_not_offered(clauses):
    assert found(**clauses) == []


def test_a_dead_machine_and_a_full_one_are_not_offered():
    dead = FleetNode(name="cellar", address="", is_alive=False, gpus=4, free_gpus=4)
    full = FleetNode(name="shed", address="", is_alive=True, gpus=1, free_gpus=0)

    assert found(dead) == []
    assert found(full) == []


def test_what_a_machine_does_not_say_is_null_and_not_judged():
    silent = FleetNode(name="silent", address="", is_alive=True, gpus=1, free_gpus=1)

    (offer,) = found(silent, gpu_name={"eq": "RTX 4090"}, gpu_total_ram={"gte": 16000})

    assert (offer["gpu_name"], offer["gpu_ram"], offer["gpu_total_ram"]) == (None, None, None)


def test_scores_are_told_by_template_and_card_and_only_where_measured():
    template = Template(id=7, hash_id="abc", created_at=0.0)
    group = Workergroup(id=2, endpoint_id=1, endpoint_name="e", template_hash="abc", created_at=0.0)
    catalog = Catalog(workergroups=[group], templates=[template])
    worker = Worker(id=5, endpoint_id=1, group_id=2, mtoken="t", created_at=0.0, gpu_name="RTX 4090")
    measured = Worker(
        id=6, endpoint_id=1, group_id=2, mtoken="t", created_at=0.0, gpu_name="RTX 4090", measured_perf=50.0
    )

    (row,) = benchmarks(
        [worker, measured], catalog, asked({"template_hash": {"eq": "abc"}, "gpu_name": {"eq": "RTX 4090"}})
    )

    assert (row["id"], row["value"], row["template_id"]) == (6, 50.0, 7)
    assert benchmarks([measured], catalog, asked({"template_hash": {"eq": "other"}})) == []


def test_a_template_is_found_by_its_hash_and_its_filters_are_text():
    templates = [
        Template(id=1, hash_id="a", created_at=0.0),
        Template(id=2, hash_id="b", created_at=0.0, extra_filters={"gpu_total_ram": {"gte": 16000}}),
    ]

    (row,) = template_rows(templates, asked({"hash_id": {"eq": "b"}}))

    assert (row["id"], row["extra_filters"]) == (2, '{"gpu_total_ram":{"gte":16000}}')

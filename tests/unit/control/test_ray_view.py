"""What the cluster shows, and what it means for each worker."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.fleet.base import FleetNode, FleetWorker, Presence, WorkerSpec
from comfyfleet.control.fleet.ray_demand import REFUSED_KEPT_S, Demand, Portion, Wish, wish
from comfyfleet.control.fleet.ray_node import NodeWorker, Reservation, free_devices
from comfyfleet.control.fleet.ray_view import Known, Look, NodeView, Placed, Placing, findings, node_view, present_nodes
from comfyfleet.control.search import parse_search

ROW = {
    "NodeID": "abcdef0123",
    "Alive": True,
    "NodeManagerAddress": "10.0.0.5",
    "NodeManagerHostname": "gpu-box",
    "Resources": {"GPU": 2.0, "gpu_ram_gb": 48.0, "CPU": 8.0},
    "Labels": {"gpu_name": "RTX_4090", "dph_total": "0.8", "ray.io/node-id": "abcdef0123"},
}


def node(number: str, *, is_alive: bool = True, is_heard: bool = True) -> NodeView:
    facts = FleetNode(name=number, address="10.0.0.1", is_alive=is_alive, gpus=2, price_hour=0.8, gpu_name="RTX_4090")
    return NodeView(id=number, facts=facts, is_heard=is_heard)


def placed(node_id: str, worker_id: int = 1, *, incarnation: str = "i1", presence=Presence.RUNNING, at: float = 5.0):
    seen = FleetWorker(id=worker_id, presence=presence, started_at=at)
    return Placed(node_id=node_id, worker=NodeWorker(seen=seen, reservation=Reservation(incarnation=incarnation)))


def known(node_id: str = "n1", *, incarnation: str = "i1", presence=Presence.RUNNING) -> dict[int, Known]:
    return {1: Known(seen=FleetWorker(id=1, presence=presence), node_id=node_id, incarnation=incarnation)}


def seen(look: Look, before: dict[int, Known]) -> FleetWorker:
    return findings(look, before).known[1].seen


def test_a_node_is_read_from_rays_books_and_labels():
    view = node_view(ROW, {"GPU": 1.0}, is_heard=True)

    assert view.has_ram
    assert msgspec.structs.asdict(view.facts) == {
        "name": "gpu-box-abcdef",
        "address": "10.0.0.5",
        "is_alive": True,
        "gpus": 2.0,
        "free_gpus": 1.0,
        "gpu_name": "RTX_4090",
        "gpu_ram_gb": 24.0,
        "price_hour": 0.8,
        "workers": (),
        "labels": {"gpu_name": "RTX_4090", "dph_total": "0.8"},
    }


def test_a_worker_has_its_nodes_name_and_its_share_of_the_price():
    found = seen(Look(nodes=(node("n1"),), placed=(placed("n1"),)), {})

    assert (found.node, found.gpu_name, found.price_hour) == ("n1", "RTX_4090", 0.4)


def test_a_worker_of_a_dead_node_is_lost():
    assert seen(Look(nodes=(node("n1", is_alive=False),)), known()).presence is Presence.LOST


@pytest.mark.parametrize("look", [Look(), Look(nodes=(node("n2"),)), Look(nodes=(node("n1", is_heard=False),))])
def test_a_worker_whose_node_has_not_been_heard_of_is_not_lost(look):
    assert seen(look, known()).presence is Presence.RUNNING


def test_a_stopped_worker_of_a_dead_node_is_still_stopped_and_can_start_elsewhere():
    look = Look(nodes=(node("n1", is_alive=False),))

    assert seen(look, known(presence=Presence.STOPPED)).presence is Presence.STOPPED


def test_of_two_folders_the_present_life_counts_and_the_other_is_cleared_once_nothing_runs_in_it():
    nodes = (node("n1"), node("n2"))
    old, new = placed("n1", incarnation="i1", at=5), placed("n2", incarnation="i2", at=9)
    both = Look(nodes=nodes, placed=(old, new))
    ended = Look(nodes=nodes, placed=(placed("n1", incarnation="i1", presence=Presence.EXITED), new))

    assert findings(both, known("n2", incarnation="i2")).known[1].node_id == "n2"
    assert findings(both, known("n2", incarnation="i2")).leftovers == (), "it ends itself: its reports are refused"
    assert findings(ended, known("n2", incarnation="i2")).leftovers == (("n1", 1),)


def test_a_worker_on_its_way_runs_and_one_that_found_no_place_is_lost():
    coming = Look(placing=(Placing(id=1, since=3.0),))
    failed = Look(placing=(Placing(id=1, since=3.0, error="no room"),))

    assert (seen(coming, {}).presence, seen(coming, {}).detail) == (Presence.RUNNING, "Ray is placing it")
    assert (seen(failed, {}).presence, seen(failed, {}).detail) == (Presence.LOST, "no room")


@pytest.mark.parametrize(
    ("own", "in_use", "given"),
    [
        (("0",), set(), ("0",)),
        (("0",), {"1"}, ("0",)),
        (("1",), {"1"}, ("0",)),
        (("0", "1"), {"1"}, ("0", "2")),
        ((), {"0"}, ()),
        (("GPU-8f",), {"GPU-8f"}, ("GPU-8f",)),
    ],
)
def test_no_two_processes_of_a_machine_get_one_device(own, in_use, given):
    assert free_devices(own, frozenset(in_use)) == given


def spec(number: int, search: str = "") -> WorkerSpec:
    query = parse_search(search)
    return WorkerSpec(id=number, mtoken="", incarnation="i", search_params=search, search=query)


def test_the_wish_is_every_active_worker_and_every_one_that_was_refused_and_no_inactive_one():
    demand = Demand()
    assert demand.news(0.0) is None, "nothing wanted, nothing to say"
    demand.placed(spec(1), wish(spec(1)))
    demand.refused(spec(2), wish(spec(2)), 0.0)
    demand.refused(spec(2), wish(spec(2)), 0.1)
    demand.refused(spec(3), wish(spec(3)), 0.2)
    told = demand.news(1.0)
    assert (len(told.held), len(told.refused)) == (1, 2), "asked twice for one worker, one place"
    demand.told(told, 1.0)
    assert demand.news(2.0) is None

    demand.refused(spec(4), wish(spec(4)), 9.0)
    demand.refused(spec(5), wish(spec(5)), 9.1)
    assert demand.news(9.5) is None, "tried again: the same two, not two more"
    demand.placed(spec(4), wish(spec(4)))
    told = demand.news(10.0)
    assert (len(told.held), len(told.refused)) == (2, 1), "one of them has its room now, and needs it as before"
    demand.ended(1)
    told = demand.news(10.5)
    assert (len(told.held), len(told.refused)) == (1, 1)
    demand.told(told, 10.5)
    assert demand.news(9.2 + REFUSED_KEPT_S).refused == ()


def test_what_a_worker_has_is_wished_for_on_its_machine_by_a_control_plane_that_did_not_place_it():
    demand = Demand()

    demand.holds((placed("n1", 1), placed("n2", 2, presence=Presence.STOPPED)))

    assert demand.news(0.0).held == {1: Wish(bundle={"GPU": 1.0}, labels={"ray.io/node-id": "n1"})}


def test_a_wish_is_in_rays_words():
    made = wish(
        WorkerSpec(
            id=1,
            mtoken="",
            incarnation="",
            search=parse_search("region=eu gpu_ram>=24 dph_total<0.5"),
            gpu_ram_gb=24,
            num_gpus=2,
        )
    )

    assert made.bundle == {"GPU": 2, "gpu_ram_gb": 48}
    assert made.labels == {"region": "in(EU,eu)"}


def test_a_name_is_wished_for_as_any_machine_may_spell_it_and_a_price_that_is_too_high_is_not_wished_for_again():
    cheap, dear = (node(name) for name in ("cheap", "dear"))
    spelled = {"gpu_name": "NVIDIA-RTX-4090", "dph_total": "0.4"}
    seen = [
        msgspec.structs.replace(cheap.facts, gpu_name="NVIDIA-RTX-4090", price_hour=0.4, labels=spelled),
        msgspec.structs.replace(
            dear.facts, gpu_name="H200", price_hour=4.0, labels={"gpu_name": "H200", "dph_total": "4.0"}
        ),
    ]

    made = wish(spec(1, "gpu_name='rtx 4090' dph_total<=1"), seen)

    assert made.labels == {
        "gpu_name": "in(NVIDIA-RTX-4090,RTX-4090,RTX_4090,rtx-4090,rtx_4090)",
        "dph_total": "!in(4.0)",
    }


def test_what_cannot_be_met_as_a_whole_is_asked_for_in_turns_so_that_each_wish_that_can_be_met_is_met():
    wishes = [Wish(bundle={"GPU": 1.0}, labels={"gpu_name": name}) for name in ("A", "B", "MISSPELLED", "C")]
    portion, met, is_unmet = Portion(), set(), False
    for _ in range(20):
        asked = portion.of(wishes, is_unmet=is_unmet)
        names = {one.labels["gpu_name"] for one in asked}
        is_unmet = "MISSPELLED" in names
        met |= set() if is_unmet else names

    assert met == {"A", "B", "C"}


def test_what_can_be_met_is_asked_for_whole():
    wishes = [Wish(bundle={"GPU": 1.0})] * 3
    portion = Portion()

    assert [list(portion.of(wishes, is_unmet=False)) for _ in range(3)] == [wishes] * 3
    assert portion.of([], is_unmet=True) == []


def test_a_machine_that_came_back_is_one_machine():
    old, new = node("old", is_alive=False), node("new")
    named = [msgspec.structs.replace(one, facts=msgspec.structs.replace(one.facts, name="a")) for one in (new, old)]

    assert [(one.name, one.is_alive) for one in present_nodes([*named, node("gone", is_alive=False)])] == [
        ("a", True),
        ("gone", False),
    ]

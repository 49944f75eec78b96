"""Nodes run in the order in which ComfyUI 0.3.64 was seen to run them, and only those that are needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.engine.plan import Plan

# Links by node, in the order of the inputs; then what was known, and the order recorded on a real server.
SD15 = {"4": [], "5": [], "6": ["4"], "7": ["4"], "3": ["4", "6", "7", "5"], "8": ["3", "4"], "9": ["8"]}
LORA = SD15 | {"3": ["10", "6", "7", "5"], "10": ["4"]}
WAN = {
    "90": [], "91": ["90"], "92": [], "93": ["101"], "94": ["102"], "95": ["94", "99", "91", "96"],
    "96": ["93", "99", "91", "104"], "97": ["95", "92"], "98": ["100"], "99": ["90"], "100": ["97"], "101": [],
    "102": [], "104": [],
}  # fmt: skip
ACE = {
    "14": ["40"], "17": [], "18": ["52", "40"], "40": [], "44": ["14"], "49": ["51", "50"], "50": [], "51": ["40"],
    "52": ["49", "14", "44", "17"], "59": ["18"],
}  # fmt: skip
BRANCHES = {"1": [], "2": ["1"], "3": ["1"], "4": ["3"]}
MIXED = {"1": [], "2": ["1"], "3": ["2"], "4": ["1"]}
RECORDED = [
    (SD15, ["9"], [], ["4", "5", "7", "6", "3", "8", "9"]),
    (SD15, ["9"], ["4", "5", "6", "7"], ["3", "8", "9"]),
    (LORA, ["9"], [], ["4", "5", "7", "6", "10", "3", "8", "9"]),
    (LORA, ["9"], ["4", "5", "6", "7"], ["10", "3", "8", "9"]),
    (WAN, ["98"], [], ["92", "104", "90", "91", "99", "101", "93", "96", "102", "94", "95", "97", "100", "98"]),
    (ACE, ["59"], [], ["40", "17", "14", "44", "50", "51", "49", "52", "18", "59"]),
    (BRANCHES, ["4"], [], ["1", "3", "4"]),
    (BRANCHES, ["2", "4"], ["1", "3", "4"], ["4", "2"]),
    (MIXED, ["4", "3"], [], ["1", "4", "2", "3"]),
]


def walk(links: dict[str, list[str]], outputs: list[str], known: set[str]) -> list[str]:
    plan = Plan(links, outputs, is_output={name: name in outputs for name in links}, known=known)
    order = []
    while (name := plan.next_node()) is not None:
        order.append(name)
        plan.finish(name)
    assert len(order) == len(plan)
    return order


@pytest.mark.parametrize(("links", "outputs", "known", "order"), RECORDED)
def test_the_order_is_the_one_recorded_on_a_real_server(
    links: dict[str, list[str]], outputs: list[str], known: list[str], order: list[str]
) -> None:
    walked = walk(links, outputs, set(known))

    # Outputs that are known are ready at once; their place among each other is arbitrary in ComfyUI too.
    assert [name for name in walked if name not in known] == [name for name in order if name not in known]


def test_a_branch_that_is_ready_is_shown_before_the_next_one_begins() -> None:
    links = {"a": [], "save a": ["a"], "b": [], "save b": ["b"]}

    assert walk(links, ["save a", "save b"], set()) == ["a", "save a", "b", "save b"]


@st.composite
def any_links(draw: st.DrawFn) -> dict[str, list[str]]:
    size = draw(st.integers(1, 12))
    return {
        str(at): [str(source) for source in draw(st.lists(st.integers(0, at - 1), max_size=3))] if at else []
        for at in range(size)
    }


@given(links=any_links(), data=st.data())
def test_every_node_runs_once_and_after_all_it_needs(links: dict[str, list[str]], data: st.DataObject) -> None:
    names = sorted(links)
    outputs = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    known = set(data.draw(st.lists(st.sampled_from(names), unique=True)))

    order = walk(links, outputs, known)

    assert len(set(order)) == len(order)
    assert set(outputs) <= set(order)
    for at, name in enumerate(order):
        if name not in known:
            assert set(links[name]) <= set(order[:at]) | known

"""A graph is bounded and rebuilt before anybody acts on it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.wire.errors import BadRequest, WorkflowRefused
from comfyfleet.wire.workflow import MAX_CHAIN, parse_graph


def a_node(**inputs: object) -> dict[str, object]:
    return {"class_type": "EmptyImage", "inputs": inputs}


@pytest.mark.parametrize("value", [None, "text", 3, [], True])
def test_a_workflow_that_is_no_object_is_a_bad_request(value: object) -> None:
    with pytest.raises(BadRequest):
        parse_graph(value)


@pytest.mark.parametrize("inputs", [None, [], "text", 1])
def test_a_node_without_an_inputs_object_is_refused_by_name(inputs: object) -> None:
    with pytest.raises(WorkflowRefused) as refusal:
        parse_graph({"7": {"class_type": "KSampler", "inputs": inputs}})

    assert refusal.value.details == {"node_id": "7", "class_type": "KSampler", "input": "inputs"}


def test_a_cycle_is_refused_naming_a_node_on_it() -> None:
    with pytest.raises(WorkflowRefused) as refusal:
        parse_graph({"1": a_node(image=["2", 0]), "2": a_node(image=["1", 0]), "3": a_node()})

    assert refusal.value.details["node_id"] == "1"
    assert refusal.value.details["reason"] == "cycle"


def test_a_node_that_only_depends_on_a_cycle_is_not_the_one_named() -> None:
    with pytest.raises(WorkflowRefused) as refusal:
        parse_graph({"1": a_node(image=["5", 0]), "5": a_node(image=["5", 0]), "7": a_node()})

    assert refusal.value.details["node_id"] == "5"


def test_a_chain_that_would_exhaust_the_engine_is_refused() -> None:
    chain = {str(n): a_node(image=[str(n - 1), 0]) for n in range(1, MAX_CHAIN + 1)}
    chain["0"] = a_node()

    with pytest.raises(WorkflowRefused):
        parse_graph(chain)
    del chain[str(MAX_CHAIN)]
    assert len(parse_graph(chain)) == MAX_CHAIN


def test_deep_nesting_and_numbers_that_are_not_finite_are_refused() -> None:
    deep: object = 1
    for _ in range(2000):
        deep = [deep]

    for bad in (deep, float("nan"), {"x": float("inf")}):
        with pytest.raises(WorkflowRefused) as refusal:
            parse_graph({"1": a_node(extra=bad)})
        assert refusal.value.details["input"] == "extra"


def test_unknown_keys_of_a_node_do_not_travel_further() -> None:
    graph = parse_graph({"1": {"class_type": "A", "inputs": {}, "is_changed": 5, "_meta": {"title": "t"}}})

    assert graph == {"1": {"class_type": "A", "inputs": {}, "_meta": {"title": "t"}}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_whatever_comes_in_the_answer_is_a_graph_or_a_named_refusal(value: object) -> None:
    try:
        graph = parse_graph(value)
    except (BadRequest, WorkflowRefused):
        return
    assert all(isinstance(node["inputs"], dict) for node in graph.values())

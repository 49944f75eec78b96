"""From a request to a graph that is safe to send."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.ids import SeededIds
from comfyfleet.wire.errors import BadRequest, NotFound, WorkflowRefused
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.shapes import models_of, shape_of
from comfyfleet.wire.workflow import MAX_DEPTH, is_link, parse_graph
from comfyfleet.worker.stages.prepare import NONCE, build_graph, roll_dice, with_nonce
from comfyfleet.worker.templates import SHIPPED, Templates

IDS = SeededIds(7)


def node(class_type="Node", **inputs):
    return {"class_type": class_type, "inputs": inputs}


def test_each_random_int_is_a_number_of_its_own_and_text_stays_text():
    graph = {"1": node(seed="__RANDOM_INT__", name="a-__RANDOM_INT__-b", deep=["x", {"y": "__RANDOM_INT__"}])}
    rolled = roll_dice(graph, IDS)["1"]["inputs"]

    assert isinstance(rolled["seed"], int)
    assert 0 <= rolled["seed"] < 2**32
    assert rolled["name"].startswith("a-")
    assert rolled["name"].endswith("-b")
    assert rolled["name"][2:-2].isdigit()
    assert rolled["deep"][1]["y"] != rolled["seed"]


def test_a_template_fills_its_parameters_and_refuses_unknown_ones():
    templates = Templates(SHIPPED)
    assert templates.names() == ["Text2Image"]

    graph = build_graph(GenerateInput(modifier="Text2Image", modifications={"prompt": "fox", "width": 256}), templates)
    assert graph["6"]["inputs"]["text"] == "fox"
    assert graph["5"]["inputs"]["width"] == 256

    with pytest.raises(BadRequest, match="colour"):
        templates.fill("Text2Image", {"colour": 1})
    with pytest.raises(NotFound, match="Text2Image"):
        templates.fill("../secrets", {})


def test_the_users_template_comes_before_the_shipped_one(tmp_path):
    (tmp_path / "Text2Image.json").write_text(json.dumps({"workflow": {"1": node()}}))

    assert Templates(tmp_path, SHIPPED).fill("Text2Image", {}) == {"1": node()}


def test_a_nonce_reaches_what_must_run_again_and_spares_loaders():
    graph = {"1": node("CheckpointLoaderSimple", ckpt_name="x"), "2": node("KSampler", model=["1", 0])}

    assert NONCE not in with_nonce(graph, "n")["1"]["inputs"]
    assert with_nonce(graph, "n")["2"]["inputs"][NONCE] == "n"
    assert NONCE not in with_nonce(graph, "n", {"1"})["2"]["inputs"]
    assert NONCE not in graph["2"]["inputs"]


def test_a_shape_knows_steps_and_not_seeds():
    def graph(**inputs):
        return {"1": node("KSampler", **{"steps": 20, "seed": 1, "text": "a", **inputs})}

    assert shape_of(graph()) == shape_of(graph(seed=2, text="b"))
    assert shape_of(graph()) != shape_of(graph(steps=21))
    assert models_of({"1": node(a="x.safetensors", b="text"), "2": node(c="sub/y.ckpt")}) == (
        "sub/y.ckpt",
        "x.safetensors",
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
node_ids = st.text(alphabet="123ab", min_size=1, max_size=2)
nodes = st.one_of(
    values,
    st.fixed_dictionaries(
        {"class_type": st.text(max_size=6) | values},
        optional={
            "inputs": st.dictionaries(
                st.text(max_size=4), values | st.tuples(node_ids, st.integers(0, 3)).map(list), max_size=4
            )
            | values,
            "_meta": values,
        },
    ),
)


@given(st.dictionaries(node_ids, nodes, max_size=6) | values)
def test_whatever_comes_in_is_refused_by_name_or_comes_out_safe(body):
    try:
        graph = parse_graph(body)
    except (BadRequest, WorkflowRefused):
        return
    text = json.dumps(graph, allow_nan=False)  # finite numbers only
    assert depth_of(json.loads(text)) <= MAX_DEPTH + 3
    for one in graph.values():
        assert set(one) <= {"class_type", "inputs", "_meta"}
        assert isinstance(one["class_type"], str)
        assert isinstance(one["inputs"], dict)
    assert not on_a_cycle(graph)


def depth_of(value):
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 1


def on_a_cycle(graph):
    waiting = {
        name: {v[0] for v in one["inputs"].values() if is_link(v) and v[0] in graph} for name, one in graph.items()
    }
    while ready := [name for name, sources in waiting.items() if not sources]:
        for name in ready:
            del waiting[name]
        for sources in waiting.values():
            sources.difference_update(ready)
    return bool(waiting)

"""What a route call says of its workflow: the digest and the models that control plane and workers know it by."""

from __future__ import annotations

from comfyfleet.client.hints import hint_of
from comfyfleet.wire.shapes import shape_of
from comfyfleet.wire.workflow import parse_graph

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "2": {"class_type": "KSampler", "inputs": {"steps": 20, "seed": "__RANDOM_INT__", "model": ["1", 0]}},
}


def test_the_hint_is_the_shape_that_workers_report_and_the_models_they_have_warm():
    assert hint_of({"input": {"workflow_json": GRAPH}}) == {
        "shape": shape_of(parse_graph(GRAPH)),
        "models": ["sd15.safetensors"],
    }


def test_another_seed_is_the_same_shape_and_other_steps_are_not():
    def shape(**inputs):
        changed = {**GRAPH, "2": {**GRAPH["2"], "inputs": {**GRAPH["2"]["inputs"], **inputs}}}
        return hint_of({"input": {"workflow_json": changed}})["shape"]

    assert shape(seed=1) == shape(seed=2)
    assert shape(steps=20) != shape(steps=40)


def test_a_payload_without_a_readable_workflow_has_no_hint():
    for payload in ({}, {"input": None}, {"input": {"modifier": "Text2Image"}}, {"input": {"workflow_json": {"1": 5}}}):
        assert hint_of(payload) is None

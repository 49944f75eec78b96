"""What ComfyUI says of a bad graph becomes a refusal that names node, input and a way out."""

from __future__ import annotations

import pytest

from comfyfleet.worker.engines.refusals import refusal, with_broken_link

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0], "vae": ["1", 2]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}
OUTPUTS = {"CheckpointLoaderSimple": 3, "VAEDecode": 1}


def stumbled(node_id: str, details: str, *, input_name: str | None = None) -> dict:
    """The answer for a link that leads nowhere; for a node in the middle ComfyUI names the input of the node behind."""
    inner = "inner_" if input_name else ""
    error = {
        "type": f"exception_during_{inner}validation",
        "message": "Exception when validating node",
        "details": details,
        "extra_info": {"input_name": input_name} if input_name else {},
    }
    found = {"errors": [error], "class_type": GRAPH[node_id]["class_type"], "dependent_outputs": ["3"]}
    return {"error": {"type": "prompt_outputs_failed_validation"}, "node_errors": {node_id: found}}


@pytest.mark.parametrize(
    ("node_id", "name", "link", "answer", "told"),
    [
        ("3", "images", ["99", 0], stumbled("3", "'99'"), "node '99', which is not in the workflow"),
        ("3", "images", [2, 0], stumbled("3", "2"), "node 2, which is not in the workflow"),
        ("3", "images", ["2", 7], stumbled("3", "tuple index out of range"), "output 7 of node 2 (VAEDecode)"),
        ("3", "images", ["2", "0"], stumbled("3", "tuple indices must be integers"), "output '0' of node 2"),
        ("2", "samples", ["77", 0], stumbled("2", "'77'", input_name="images"), "node '77'"),
        ("2", "vae", ["1", 3], stumbled("2", "tuple index out of range", input_name="images"), "(it has 3)"),
    ],
)
def test_a_link_that_leads_nowhere_is_named_by_node_and_input(node_id, name, link, answer, told) -> None:
    node = GRAPH[node_id]
    graph = {**GRAPH, node_id: {**node, "inputs": {**node["inputs"], name: link}}}

    error = with_broken_link(refusal(answer, graph), graph, OUTPUTS)

    assert (error.details["node_id"], error.details["input"]) == (node_id, name)
    assert error.message.startswith(f"node {node_id} ({node['class_type']}), input {name}: ")
    assert told in error.message


def test_an_unknown_class_is_named_with_the_nearest_one_where_the_engine_knows_it() -> None:
    graph = {"7": {"class_type": "EmptyImagee", "inputs": {}}}
    said = {
        "type": "invalid_prompt",
        "message": "Cannot execute because node EmptyImagee does not exist.",
        "details": "Node ID '#7'",
    }

    plain = refusal({"error": said, "node_errors": {}}, graph)
    helpful = refusal({"error": {**said, "extra_info": {"nearest": "EmptyImage"}}, "node_errors": {}}, graph)

    assert plain.details == {"node_id": "7", "class_type": "EmptyImagee", "input": "class_type", "type": said["type"]}
    assert helpful.details["nearest"] == "EmptyImage"
    assert helpful.message.endswith("; the nearest there is: 'EmptyImage'")

"""What is wrong with a link or a class is told of our own nodes as ComfyUI 0.3.64 tells it of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyfleet.engine.graph import PromptRefused, check_prompt
from comfyfleet.engine.nodes import all_nodes
from support.engine_world import folders_below, node

DECLARATIONS = all_nodes().declarations()
QUALITIES = ["V0", "128k", "320k"]
FORMATS = {"default": "auto", "multiselect": False, "options": ["auto", "mp4"]}


def refused(prompt: dict, root: Path) -> PromptRefused:
    with pytest.raises(PromptRefused) as raised:
        check_prompt(prompt, DECLARATIONS, folders_below(root))
    return raised.value


@pytest.mark.parametrize(
    ("target", "name", "wanted", "config"),
    [
        (node("SaveAudioMP3", audio=["1", 0], filename_prefix="x"), "quality", str(QUALITIES),
         [QUALITIES, {"default": "V0"}]),
        (node("SaveVideo", video=["2", 0], filename_prefix="x", codec="auto"), "format", "COMBO", ["COMBO", FORMATS]),
    ],
)  # fmt: skip
def test_a_link_that_brings_no_choice_is_told_the_list_unless_the_node_is_declared_by_schema(
    target: dict, name: str, wanted: str, config: list, tmp_path: Path
) -> None:
    target["inputs"][name] = ["3", 0]
    graph = {
        "0": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "1": node("EmptyAudio", duration=1.0, sample_rate=44100, channels=2),
        "2": node("CreateVideo", images=["0", 0], fps=8.0),
        "3": node("PrimitiveString", value="auto"),
        "4": target,
    }

    problem = refused(graph, tmp_path).node_errors["4"]["errors"][0]

    assert problem["type"] == "return_type_mismatch"
    assert problem["details"] == f"{name}, received_type(STRING) mismatch input_type({wanted})"
    assert problem["extra_info"] == {
        "input_name": name,
        "input_config": config,
        "received_type": "STRING",
        "linked_node": ["3", 0],
    }


def test_an_input_without_facts_is_described_with_none(tmp_path: Path) -> None:
    problem = refused({"1": node("PreviewImage", images=["2"])}, tmp_path).node_errors["1"]["errors"][0]

    assert (problem["type"], problem["extra_info"]["input_config"]) == ("bad_linked_input", ["IMAGE", {}])


def test_a_link_that_names_its_node_by_a_list_is_told_as_python_tells_it(tmp_path: Path) -> None:
    problem = refused({"1": node("PreviewImage", images=[["2"], 0])}, tmp_path).node_errors["1"]["errors"][0]

    assert (problem["type"], problem["details"]) == ("exception_during_validation", "unhashable type: 'list'")
    assert problem["extra_info"]["exception_type"] == "TypeError"


@pytest.mark.parametrize("class_type", [None, 5, "", ["PreviewImage"]])
def test_a_class_that_is_given_but_is_none_does_not_exist(class_type: object, tmp_path: Path) -> None:
    error = refused({"1": {"class_type": class_type, "inputs": {}}}, tmp_path).error

    assert (error["type"], error["details"]) == ("invalid_prompt", "Node ID '#1'")
    assert error["message"] == f"Cannot execute because node {class_type} does not exist."

"""No prompt is too deep, too long or too strange: it is checked, or refused, and nothing falls over."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyfleet.engine.graph import PromptRefused, check_prompt
from comfyfleet.engine.registry import NodeRegistry, choice, integer, link, text
from support.engine_world import folders_below, node

REGISTRY = NodeRegistry()
REGISTRY.node(
    "EmptyImage", inputs={"width": integer(512, 1, 16384), "height": integer(512, 1, 16384)}, outputs=["IMAGE"]
)(lambda run, **_: (None,))
REGISTRY.node("ImageInvert", inputs={"image": link("IMAGE")}, outputs=["IMAGE"])(lambda run, **_: (None,))
REGISTRY.node("SaveImage", inputs={"images": link("IMAGE"), "filename_prefix": text("")}, is_output=True)(
    lambda run, **_: (None,)
)
REGISTRY.node(
    "SaveAudioMP3", inputs={"audio": link("AUDIO"), "quality": choice(["V0", "128k", "320k"])}, is_output=True
)(lambda run, **_: (None,))
DECLARATIONS = REGISTRY.declarations()


def image(**changes) -> dict:
    return node("EmptyImage", **({"width": 64, "height": 64} | changes))


def save(source: object) -> dict:
    return node("SaveImage", images=source, filename_prefix="x")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_what_kills_a_comfyui_is_refused(tmp_path: Path) -> None:
    good = {"1": image(), "2": save(["1", 0])}
    killers = {
        "a node without inputs that nothing needs": {"3": {"class_type": "EmptyImage"}},
        "inputs that are null": {"3": {"class_type": "EmptyImage", "inputs": None}},
        "inputs that are a list": {"3": {"class_type": "EmptyImage", "inputs": []}},
        "a value nested too deep": {"3": image(bogus=nested(900))},
        "an extra input nested too deep on a node that runs": {"1": image(bogus=nested(900))},
    }

    for what, change in killers.items():
        assert _refused({**good, **change}, tmp_path).error["type"], what
    assert check_prompt(good | {"3": image(bogus=nested(300))}, DECLARATIONS, folders_below(tmp_path)).outputs == ["2"]


def test_a_chain_of_thousands_of_nodes_is_no_problem(tmp_path: Path) -> None:
    prompt = {"0": image()} | {str(n): node("ImageInvert", image=[str(n - 1), 0]) for n in range(1, 5000)}
    prompt["save"] = save(["4999", 0])

    assert check_prompt(prompt, DECLARATIONS, folders_below(tmp_path)).outputs == ["save"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
links = st.tuples(st.sampled_from(["1", "2", "3", "9"]), st.integers(-3, 3)).map(list)
any_inputs = st.dictionaries(
    st.sampled_from(["width", "height", "image", "images", "audio", "quality", "filename_prefix"]), links | values
)
any_nodes = st.fixed_dictionaries(
    {"class_type": st.sampled_from(sorted(DECLARATIONS))}, optional={"inputs": any_inputs | values}
)


@given(prompt=st.dictionaries(st.sampled_from(["1", "2", "3", "4"]), any_nodes | values, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_prompt_is_either_checked_or_refused(prompt: dict, tmp_path: Path) -> None:
    try:
        checked = check_prompt(prompt, DECLARATIONS, folders_below(tmp_path))
    except PromptRefused:
        return
    assert checked.outputs
    assert not set(checked.outputs) & set(checked.node_errors)


def _refused(prompt: dict, root: Path) -> PromptRefused:
    with pytest.raises(PromptRefused) as refused:
        check_prompt(prompt, DECLARATIONS, folders_below(root))
    return refused.value

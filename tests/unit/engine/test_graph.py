"""A prompt that cannot run is refused in ComfyUI's words, naming node and input; what can run, runs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from comfyfleet.engine.graph import PromptRefused, check_prompt
from comfyfleet.engine.registry import InputFiles, ModelFiles, NodeRegistry, choice, integer, link, real, text
from support.engine_world import folders_below, node

REGISTRY = NodeRegistry()
REGISTRY.node(
    "EmptyImage",
    inputs={name: integer(512, 1, 16384, step=1) for name in ("width", "height")}
    | {"batch_size": integer(1, 1, 4096), "color": integer(0, 0, 0xFFFFFF)},
    outputs=["IMAGE"],
)(lambda run, **_: (None,))
REGISTRY.node("ImageInvert", inputs={"image": link("IMAGE")}, outputs=["IMAGE"])(lambda run, **_: (None,))
REGISTRY.node("EmptyAudio", inputs={"duration": real(60.0, 0.0, 1e9)}, outputs=["AUDIO"])(lambda run, **_: (None,))
REGISTRY.node(
    "SaveImage",
    inputs={"images": link("IMAGE", tooltip="The images to save."), "filename_prefix": text("ComfyUI")},
    is_output=True,
)(lambda run, **_: (None,))
REGISTRY.node(
    "SaveAudioMP3",
    inputs={
        "audio": link("AUDIO"),
        "filename_prefix": text("x"),
        "quality": choice(["V0", "128k", "320k"], default="V0"),
    },
    is_output=True,
)(lambda run, **_: (None,))
REGISTRY.node("LoadImage", inputs={"image": choice(InputFiles(media="image", refusal="Invalid image file: {}"))},
              outputs=["IMAGE"])(lambda run, **_: (None,))  # fmt: skip
REGISTRY.node("VAELoader", inputs={"vae_name": choice(ModelFiles("vae"))}, outputs=["VAE"])(lambda run, **_: (None,))
REGISTRY.node("UseVae", inputs={"vae": link("VAE")}, is_output=True)(lambda run, **_: (None,))
DECLARATIONS = REGISTRY.declarations()
WIDTH = ["INT", {"default": 512, "min": 1, "max": 16384, "step": 1}]
IMAGES = ["IMAGE", {"tooltip": "The images to save."}]


def image(**changes) -> dict:
    return node("EmptyImage", **({"width": 64, "height": 64, "batch_size": 1, "color": 1} | changes))


def save(source: object) -> dict:
    return node("SaveImage", images=source, filename_prefix="x")


def refuse(prompt: dict, root: Path, targets: list[str] | None = None) -> PromptRefused:
    with pytest.raises(PromptRefused) as refused:
        check_prompt(prompt, DECLARATIONS, folders_below(root), targets)
    return refused.value


# (what is wrong, prompt, node that is to blame, its error)
NODE_ERRORS = [
    (
        "a required input is missing",
        {"1": node("EmptyImage", height=64, batch_size=1, color=1), "2": save(["1", 0])},
        "1",
        ("required_input_missing", "Required input is missing", "width", {"input_name": "width"}),
    ),
    (
        "a value is too small",
        {"1": image(width=0), "2": save(["1", 0])},
        "1",
        ("value_smaller_than_min", "Value 0 smaller than min of 1", "width",
         {"input_name": "width", "input_config": WIDTH, "received_value": 0}),
    ),
    (
        "a value is too big",
        {"1": image(width=999999), "2": save(["1", 0])},
        "1",
        ("value_bigger_than_max", "Value 999999 bigger than max of 16384", "width",
         {"input_name": "width", "input_config": WIDTH, "received_value": 999999}),
    ),
    (
        "a value is no number",
        {"1": image(width="abc"), "2": save(["1", 0])},
        "1",
        ("invalid_input_type", "Failed to convert an input value to a INT value",
         "width, abc, invalid literal for int() with base 10: 'abc'",
         {"input_name": "width", "input_config": WIDTH, "received_value": "abc",
          "exception_message": "invalid literal for int() with base 10: 'abc'"}),
    ),
    (
        "a value is not in the list",
        {"1": node("EmptyAudio", duration=1.0),
         "2": node("SaveAudioMP3", audio=["1", 0], filename_prefix="x", quality="V9")},
        "2",
        ("value_not_in_list", "Value not in list", "quality: 'V9' not in ['V0', '128k', '320k']",
         {"input_name": "quality", "input_config": [["V0", "128k", "320k"], {"default": "V0"}],
          "received_value": "V9", "nearest": "V0", "hint": "did you mean 'V0'?"}),
    ),
    (
        "a link brings another type",
        {"1": node("EmptyAudio", duration=1.0), "3": save(["1", 0])},
        "3",
        ("return_type_mismatch", "Return type mismatch between linked nodes",
         "images, received_type(AUDIO) mismatch input_type(IMAGE)",
         {"input_name": "images", "input_config": IMAGES, "received_type": "AUDIO", "linked_node": ["1", 0]}),
    ),
    (
        "a link is no pair",
        {"1": image(), "2": save(["1"])},
        "2",
        ("bad_linked_input", "Bad linked input, must be a length-2 list of [node_id, slot_index]", "images",
         {"input_name": "images", "input_config": IMAGES, "received_value": ["1"]}),
    ),
    (
        "a link leads to a slot that is not there",
        {"1": image(), "2": save(["1", 5])},
        "2",
        ("exception_during_validation", "Exception when validating node", "tuple index out of range",
         {"exception_type": "IndexError", "traceback": []}),
    ),
    (
        "a link leads to a node that is not there",
        {"1": image(), "2": save(["77", 0])},
        "2",
        ("exception_during_validation", "Exception when validating node", "'77'",
         {"exception_type": "KeyError", "traceback": []}),
    ),
    (
        "a link names its node by number",
        {"1": image(), "2": save([1, 0])},
        "2",
        ("exception_during_validation", "Exception when validating node", "1",
         {"exception_type": "KeyError", "traceback": []}),
    ),
    (
        "a link's slot is text",
        {"1": image(), "2": save(["1", "0"])},
        "2",
        ("exception_during_validation", "Exception when validating node",
         "tuple indices must be integers or slices, not str", {"exception_type": "TypeError", "traceback": []}),
    ),
    (
        "an output has no inputs",
        {"1": image(), "2": {"class_type": "SaveImage"}},
        "2",
        ("exception_during_validation", "Exception when validating node", "'inputs'",
         {"exception_type": "KeyError", "traceback": []}),
    ),
    (
        "an inner node has no inputs",
        {"1": {"class_type": "EmptyImage"}, "2": save(["1", 0])},
        "1",
        ("exception_during_inner_validation", "Exception when validating inner node", "'inputs'",
         {"input_name": "images", "input_config": IMAGES, "exception_message": "'inputs'",
          "exception_type": "KeyError", "traceback": [], "linked_node": ["1", 0]}),
    ),
    (
        "an input file is missing",
        {"1": node("LoadImage", image="missing.png"), "2": save(["1", 0])},
        "1",
        ("custom_validation_failed", "Custom validation failed for node", "image - Invalid image file: missing.png",
         {"input_name": "image"}),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "blamed", "error"), [case[1:] for case in NODE_ERRORS], ids=[c[0] for c in NODE_ERRORS]
)
def test_what_is_wrong_with_a_node_is_told_in_comfyuis_words(
    prompt: dict, blamed: str, error: tuple, tmp_path: Path
) -> None:
    refused = refuse(copy.deepcopy(prompt), tmp_path)

    kind, message, details, extra_info = error
    assert refused.error["type"] == "prompt_outputs_failed_validation"
    assert refused.node_errors[blamed] == {
        "errors": [{"type": kind, "message": message, "details": details, "extra_info": extra_info}],
        "dependent_outputs": [name for name in prompt if DECLARATIONS[prompt[name]["class_type"]].is_output],
        "class_type": prompt[blamed]["class_type"],
    }
    on_output = DECLARATIONS[prompt[blamed]["class_type"]].is_output
    assert refused.error["details"] == (f"{message}: {details}" if on_output else "")


PROMPT_ERRORS = [
    ({}, None, "prompt_no_outputs", "Prompt has no outputs", ""),
    ({"1": image()}, None, "prompt_no_outputs", "Prompt has no outputs", ""),
    ({"1": image(), "2": save(["1", 0])}, ["1"], "prompt_no_outputs", "Prompt has no outputs", ""),
    ({"1": image(), "2": save(["1", 0])}, [], "prompt_no_outputs", "Prompt has no outputs", ""),
    (
        {"1": node("NoSuchNode"), "2": save(["1", 0])},
        None,
        "invalid_prompt",
        "Cannot execute because node NoSuchNode does not exist.",
        "Node ID '#1'",
    ),
    (
        {"1": {"inputs": {}}, "2": save(["1", 0])},
        None,
        "invalid_prompt",
        "Cannot execute because a node is missing the class_type property.",
        "Node ID '#1'",
    ),
    (
        {"1": "x"},
        None,
        "invalid_prompt",
        "Cannot execute because a node is missing the class_type property.",
        "Node ID '#1'",
    ),
    (
        {"1": None},
        None,
        "invalid_prompt",
        "Cannot execute because a node is missing the class_type property.",
        "Node ID '#1'",
    ),
]


@pytest.mark.parametrize(("prompt", "targets", "kind", "message", "details"), PROMPT_ERRORS)
def test_what_is_wrong_with_a_prompt_is_told_in_comfyuis_words(
    prompt: dict, targets: list[str] | None, kind: str, message: str, details: str, tmp_path: Path
) -> None:
    refused = refuse(prompt, tmp_path, targets)

    assert (refused.error["type"], refused.error["message"], refused.error["details"]) == (kind, message, details)
    assert refused.node_errors == {}


def test_an_unknown_node_comes_with_the_way_to_a_real_comfyui_and_the_nearest_name(tmp_path: Path) -> None:
    refused = refuse({"1": node("EmptyImages"), "2": save(["1", 0])}, tmp_path)

    assert refused.error["extra_info"]["nearest"] == "EmptyImage"
    assert "COMFYUI_API_BASE" in refused.error["extra_info"]["hint"]


def test_a_node_like_no_other_comes_with_no_name(tmp_path: Path) -> None:
    refused = refuse({"1": node("Nope"), "2": save(["1", 0])}, tmp_path)

    assert refused.error["extra_info"]["nearest"] is None


def test_a_missing_model_file_comes_with_the_nearest_name(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "vae"
    folder.mkdir(parents=True)
    (folder / "wan_2.1_vae.safetensors").touch()

    refused = refuse(
        {"1": node("VAELoader", vae_name="wan2.1_vae.safetensors"), "2": node("UseVae", vae=["1", 0])}, tmp_path
    )

    (error,) = refused.node_errors["1"]["errors"]
    assert error["details"] == "vae_name: 'wan2.1_vae.safetensors' not in ['wan_2.1_vae.safetensors']"
    assert error["extra_info"]["nearest"] == "wan_2.1_vae.safetensors"


def test_a_long_list_is_not_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "vae"
    folder.mkdir(parents=True)
    for number in range(21):
        (folder / f"{number}.safetensors").touch()

    refused = refuse({"1": node("VAELoader", vae_name="x"), "2": node("UseVae", vae=["1", 0])}, tmp_path)

    (error,) = refused.node_errors["1"]["errors"]
    assert error["details"] == "vae_name: 'x' not in (list of length 21)"
    assert error["extra_info"]["input_config"] is None


@pytest.mark.parametrize("absolute", ["/etc/hostname", "../models/secret.png", "sub/../../x.png", "a\0b.png", ""])
def test_an_input_name_never_leads_out_of_its_folder(absolute: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "secret.png").touch()

    refused = refuse({"1": node("LoadImage", image=absolute), "2": save(["1", 0])}, tmp_path)

    assert refused.node_errors["1"]["errors"][0]["type"] == "custom_validation_failed"


def test_a_cycle_is_refused_by_name(tmp_path: Path) -> None:
    prompt = {
        "1": node("ImageInvert", image=["2", 0]),
        "2": node("ImageInvert", image=["1", 0]),
        "3": save(["2", 0]),
    }

    refused = refuse(prompt, tmp_path)

    assert refused.error["type"] == "prompt_outputs_failed_validation"
    assert refused.error["details"] == "Node 2 (ImageInvert) depends on itself: the links form a cycle"
    assert refused.node_errors["2"]["errors"][0]["type"] == "dependency_cycle"


def test_a_cycle_that_no_output_needs_is_nobodys_business(tmp_path: Path) -> None:
    prompt = {
        "1": image(),
        "2": save(["1", 0]),
        "3": node("ImageInvert", image=["4", 0]),
        "4": node("ImageInvert", image=["3", 0]),
    }

    assert check_prompt(prompt, DECLARATIONS, folders_below(tmp_path)).outputs == ["2"]


def test_good_outputs_run_although_another_one_is_wrong(tmp_path: Path) -> None:
    prompt = {
        "1": node("EmptyAudio", duration=1.0),
        "2": node("SaveAudioMP3", audio=["1", 0], filename_prefix="x", quality="V0"),
        "3": save(["1", 0]),
    }

    checked = check_prompt(prompt, DECLARATIONS, folders_below(tmp_path))

    assert checked.outputs == ["2"]
    assert list(checked.node_errors) == ["3"]
    assert checked.node_errors["3"]["dependent_outputs"] == ["3"]


def test_a_bad_source_is_named_with_every_output_that_needs_it(tmp_path: Path) -> None:
    prompt = {"1": image(width=0), "2": save(["1", 0]), "3": save(["1", 0]), "4": image(), "5": save(["4", 0])}

    checked = check_prompt(prompt, DECLARATIONS, folders_below(tmp_path))

    assert checked.outputs == ["5"]
    assert checked.node_errors["1"]["dependent_outputs"] == ["2", "3"]


@pytest.mark.parametrize(
    ("given_value", "used"), [("64", 64), (64.9, 64), (True, 1), ({"__value__": 64}, 64), ({"__value__": "64"}, 64)]
)
def test_values_are_converted_in_place(given_value: object, used: int, tmp_path: Path) -> None:
    prompt = {"1": image(width=given_value), "2": save(["1", 0])}

    check_prompt(prompt, DECLARATIONS, folders_below(tmp_path))

    assert prompt["1"]["inputs"]["width"] == used
    assert type(prompt["1"]["inputs"]["width"]) is int


@pytest.mark.parametrize("infinite", ["inf", "nan", "-Infinity"])
def test_a_number_is_finite(infinite: str, tmp_path: Path) -> None:
    prompt = {
        "1": node("EmptyAudio", duration=infinite),
        "2": node("SaveAudioMP3", audio=["1", 0], filename_prefix="", quality="V0"),
    }

    assert refuse(prompt, tmp_path).node_errors["1"]["errors"][0]["type"] == "invalid_input_type"


@pytest.mark.parametrize("written", ["x", 3, None, {"a": 1}])
def test_what_only_a_link_can_bring_is_refused_as_a_value(written: object, tmp_path: Path) -> None:
    prompt = {"2": save(written)}

    problem = refuse(prompt, tmp_path).node_errors["2"]["errors"][0]

    assert (problem["type"], problem["extra_info"]["input_name"]) == ("bad_linked_input", "images")
    assert problem["details"] == "images, only a link brings IMAGE"


def test_extra_inputs_and_negative_slots_pass_as_in_comfyui(tmp_path: Path) -> None:
    prompt = {"1": image(audioUI="x"), "2": save(["1", -1])}

    assert check_prompt(prompt, DECLARATIONS, folders_below(tmp_path)).outputs == ["2"]

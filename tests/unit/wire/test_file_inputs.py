"""Files are looked for where a graph expects them, and nowhere else; a plain name stays inside the input folder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.wire.errors import WorkflowRefused
from comfyfleet.wire.file_inputs import (
    FileReference,
    file_references,
    only_engine_knows,
    unfit_name,
    upload_inputs,
    with_names,
)


def a_node(class_type: str, title: str = "", **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


@pytest.mark.parametrize(
    ("class_type", "name"),
    [
        ("LoadImage", "image"), ("LoadImageMask", "image"), ("LoadAudio", "audio"), ("LoadVideo", "file"),
        ("LoadLatent", "latent"), ("VHS_LoadVideo", "video"), ("Load3D", "model_file"), ("MyOwnImageLoader", "image"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["http://a.test/x", "HTTPS://a.test/x", "s3://b/k", " https://a.test/x "])
def test_a_url_at_a_loader_is_a_file(class_type: str, name: str, value: str) -> None:
    [reference] = file_references({"7": a_node(class_type, **{name: value})})

    assert (reference.node_id, reference.input, reference.url) == ("7", name, value.strip())


def test_a_url_in_a_title_or_a_prompt_is_text() -> None:
    url = "http://169.254.169.254/latest"
    graph = {
        "1": a_node("LoadImage", title=url, image="cat.png"),
        "2": a_node("CLIPTextEncode", text=url),
        "3": a_node("SaveImage", filename_prefix=url, images=["1", 0]),
        "4": a_node("LoraLoader", lora_name=url),
    }

    assert file_references(graph) == []


def test_the_engines_own_word_on_uploads_counts() -> None:
    info = {
        "FancyThing": {"input": {"required": {"source": [["a.png"], {"image_upload": True}], "n": ["INT", {}]}}},
        "Other": {"input": {"required": {"source": ["STRING", {}]}}},
    }
    graph = {"1": a_node("FancyThing", source="https://a.test/x"), "2": a_node("Other", source="https://a.test/y")}

    assert [one.node_id for one in file_references(graph, upload_inputs(info))] == ["1"]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret.png",
        "a/../../b",
        "C:\\x.png",
        "..\\x",
        "~/x",
        "file:///etc/passwd",
        "ftp://a/b",
        "a\0b",
        "\\\\host\\x",
    ],
)
def test_a_path_out_of_the_input_folder_is_refused_by_node_and_input(name: str) -> None:
    with pytest.raises(WorkflowRefused) as refusal:
        file_references({"12": a_node("LoadImage", image=name)})

    assert refusal.value.details["node_id"] == "12"
    assert refusal.value.details["input"] == "image"


@pytest.mark.parametrize("name", ["cat.png", "day one/cat.png", "comfyfleet/ab12.png", "cat.png [output]", "über.png"])
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert file_references({"1": a_node("LoadImage", image=name)}) == []


@given(st.text(alphabet="a./\\:~ \0é", max_size=30))
def test_whatever_name_is_let_through_stays_below_the_folder(name: str) -> None:
    if unfit_name(name) is None:
        depth = 0
        for part in name.replace("\\", "/").split("/"):
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            assert depth >= 0
        assert not name.startswith(("/", "\\"))


def test_an_object_says_what_it_is() -> None:
    graph = {
        "1": a_node("LoadImage", image={"base64": "aGk=", "filename": "x.png"}),
        "2": a_node("LoadImage", image={"url": "https://a.test/x", "headers": {"Authorization": "Bearer t"}}),
    }
    first, second = file_references(graph)

    assert (first.encoded, first.filename, second.url) == ("aGk=", "x.png", "https://a.test/x")
    assert "Bearer" not in repr(second)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"url": "x"},
        {"url": "file:///x"},
        {"url": "https://a", "base64": "aGk="},
        {"url": 5},
        {"url": "https://a", "headers": {"a": 1}},
        {"url": "https://a", "headers": {"a": "b\r\nHost: c"}},
        {"url": "https://a", "headers": {"a b": "c"}},
        {"url": "https://a", "headers": {"Host": "c"}},
        {"url": "https://a", "headers": {"content-length": "5"}},
    ],
)
def test_an_object_that_says_nothing_is_refused(value: dict) -> None:
    with pytest.raises(WorkflowRefused):
        file_references({"1": a_node("LoadImage", image=value)})


def test_the_callers_graph_is_not_changed() -> None:
    graph = {"1": a_node("LoadImage", image="https://a.test/x")}
    reference = FileReference(node_id="1", class_type="LoadImage", input="image", url="https://a.test/x")

    rebuilt = with_names(graph, [(reference, "comfyfleet/ab.png")])

    assert rebuilt["1"]["inputs"]["image"] == "comfyfleet/ab.png"
    assert graph["1"]["inputs"]["image"] == "https://a.test/x"


def test_only_a_link_at_a_place_nobody_knows_waits_for_the_engines_word():
    def graph(class_type, **inputs):
        return {"1": {"class_type": class_type, "inputs": inputs}}

    assert only_engine_knows(graph("Picker", choice="https://example.com/cat.png"))
    assert only_engine_knows(graph("Picker", choice=" DATA:image/png;base64,AAAA"))
    assert only_engine_knows(graph("Picker", choice={"url": "https://example.com/cat.png"}))
    assert not only_engine_knows(graph("LoadImage", image="https://example.com/cat.png"))
    assert not only_engine_knows(graph("Picker", choice="cat.png", other=["2", 0], number=3))

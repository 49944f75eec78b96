"""How nodes are described to clients: the two shapes of ComfyUI, and the pixel-space autoencoder among the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyfleet.engine.description import MODULES, object_info
from comfyfleet.engine.nodes import all_nodes
from support.engine_world import EngineWorld, folders_below, node

DECLARATIONS = all_nodes().declarations()


@pytest.fixture
def described(tmp_path: Path):
    folders = folders_below(tmp_path)
    return {name: object_info(declaration, folders) for name, declaration in DECLARATIONS.items()}


def test_a_node_declared_plainly_says_only_what_there_is_to_say(described: dict) -> None:
    scale, loader = described["ImageScale"], described["VAELoader"]

    assert scale["input"]["required"]["crop"] == [["disabled", "center"]]
    assert scale["input"]["required"]["image"] == ["IMAGE"]
    assert "api_node" not in scale
    assert "output_tooltips" not in scale
    assert scale["python_module"] == "nodes"
    assert loader["input"]["required"]["vae_name"] == [["pixel_space"]]
    assert described["SaveImage"]["input"]["hidden"] == {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    assert described["PreviewAny"]["input"]["required"]["source"] == ["*", {}]


def test_a_node_declared_by_schema_gives_all_facts_of_itself(described: dict) -> None:
    film = described["SaveWEBM"]

    assert film["input"]["required"]["codec"] == ["COMBO", {"multiselect": False, "options": ["vp9", "av1"]}]
    assert film["input"]["required"]["images"] == ["IMAGE", {}]
    assert film["input"]["required"]["filename_prefix"] == ["STRING", {"multiline": False, "default": "ComfyUI"}]
    assert film["input"]["hidden"] == {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]}
    assert (film["deprecated"], film["experimental"], film["api_node"]) == (False, True, False)
    assert (film["display_name"], film["output_tooltips"]) == (None, [])
    assert film["python_module"] == "comfy_extras.nodes_video"
    assert described["PrimitiveInt"]["input"]["required"]["value"][1].get("default", "none") == "none"


def test_every_description_is_whole_and_every_name_in_the_tables_is_a_node(described: dict) -> None:
    assert MODULES.keys() <= described.keys()
    for name, info in described.items():
        assert info["name"] == name
        assert len(info["output"]) == len(info["output_name"]) == len(info["output_is_list"])
        assert len(info.get("output_tooltips", info["output"])) == len(info["output"])
        assert {key: list(names) for key, names in info["input"].items()} == info["input_order"]


def test_pictures_are_their_own_latents_in_pixel_space(tmp_path: Path) -> None:
    world = EngineWorld(tmp_path)
    outcome = world.run(
        {
            "1": node("VAELoader", vae_name="pixel_space"),
            "2": node("EmptyImage", width=9, height=5, batch_size=2, color=0x336699),
            "3": node("VAEEncode", pixels=["2", 0], vae=["1", 0]),
            "4": node("VAEDecode", samples=["3", 0], vae=["1", 0]),
            "5": node("SaveImage", images=["4", 0], filename_prefix="same"),
        }
    )

    assert outcome.status == "success", outcome.failure
    assert [shown["filename"] for shown in outcome.outputs["5"]["images"]] == ["same_00001_.png", "same_00002_.png"]
    assert not outcome.miniature
    assert outcome.resident_models == ()

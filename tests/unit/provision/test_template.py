"""A template says what a worker needs; a wrong one is refused naming the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyfleet.cli.template import own_template
from comfyfleet.provision.template import find_template, parse_template, shipped_templates
from comfyfleet.wire.errors import BadRequest, NotFound, WorkflowRefused


def test_the_documents_templates_ship_and_each_is_found_by_name_and_hash() -> None:
    shipped = shipped_templates()

    assert {template.name for template in shipped} == {"ace-step", "wan-2.2-t2v", "sd15", "local", "custom"}
    for template in shipped:
        assert find_template(template.name) == find_template(template.hash_id) == template


def test_every_shipped_benchmark_is_a_graph() -> None:
    graphs = {template.name: template.benchmark_graph() for template in shipped_templates()}

    assert {name for name, graph in graphs.items() if graph is None} == {"custom"}


def test_the_wan_template_holds_the_six_files_of_the_document() -> None:
    paths = {model.relative_path for model in find_template("wan-2.2-t2v").models}

    assert paths == {
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "vae/wan_2.1_vae.safetensors",
        "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
        "loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors",
    }


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("nonsense = 1", "nonsense"),
        ('gpu_ram_gb = "much"', "gpu_ram_gb"),
        ('[[models]]\nurl = "ftp://x/y"\nfolder = "vae"', "models[0].url"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "../../etc"', "models[0].folder"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "vae"\nname = "/etc/passwd"', "models[0].name"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "vae"\nsha256 = "abc"', "models[0].sha256"),
        ("gpu_ram_gb = nan", "gpu_ram_gb"),
        ("benchmark_limit_s = -1", "benchmark_limit_s"),
        ('[[models]]\nurl = "https://x:99999/y"\nfolder = "vae"', "models[0].url"),
        ('[[models]]\nurl = "https://[::1/y"\nfolder = "vae"', "models[0].url"),
        ('[[models]]\nurl = "hf://"\nfolder = "vae"\nname = "x"', "models[0].url"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "."', "models[0].folder"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "vae"\nname = "a\\u0000b"', "models[0].name"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "vae"\nname = "a/"', "models[0].name"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "vae"\nsize_bytes = -1', "models[0].size_bytes"),
        (
            '[[models]]\nurl = "https://x/y"\nfolder = "v"\n[[models]]\nurl = "https://z/y"\nfolder = "v"',
            "models[1].name",
        ),
        ('[[custom_nodes]]\nrepository = "https://x/y"\ncommit = "main"', "custom_nodes[0].commit"),
        ('[[models]]\nurl = "https://x/y"\nfolder = "v"\nsha265 = "a"', "models[0].sha265"),
        (f'[[custom_nodes]]\nrepository = "https://x/y"\ncommit = "{"a" * 40}"\nref = "v1"', "custom_nodes[0].ref"),
        ("[environment]\nFLAGS = [1]", "environment.FLAGS"),
    ],
)
def test_a_wrong_template_is_refused_by_the_field_that_is_wrong(text: str, field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_template(text.encode(), name="mine")

    assert refused.value.details["field"] == field


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"wan-2\.2-t2v"):
        find_template("wan")
    with pytest.raises(NotFound):
        find_template(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 100_000, b"[]", b'{"1": 5}'])
def test_a_benchmark_that_is_no_graph_is_refused_by_its_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "mine.json").write_bytes(content)
    template = parse_template(b'benchmark = "mine.json"', name="mine", folder=tmp_path)

    with pytest.raises((BadRequest, WorkflowRefused), match=r"mine\.json|node 1"):
        template.benchmark_graph()


def test_a_file_of_the_users_own_is_a_template_that_a_control_plane_can_name(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('description = "mine"\nbenchmark = "graph.json"\n[environment]\nCOMFYUI_ARGS = "--lowvram --fast"\n')

    with pytest.raises(BadRequest, match=r"graph\.json"):
        own_template(str(own))
    (tmp_path / "graph.json").write_text('{"1": {"class_type": "EmptyImage", "inputs": {}}}')

    flags = "-e 'COMFYUI_ARGS=--lowvram --fast'"
    assert own_template(str(own)) == {"name": str(own), "desc": "mine", "env": flags}
    assert own_template("sd15") is None

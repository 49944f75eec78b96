"""The file reader: what it maps, and what it says about files that are no models."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from comfyfleet.engine.models.checkpoint import DTYPES, open_checkpoint
from comfyfleet.engine.models.families import demand, family_of
from comfyfleet.wire.errors import ModelFileUnusable

MODELS = Path(__file__).parents[3] / "goldens" / "models"


def test_each_golden_file_is_recognised():
    found = {path.name: family_of(open_checkpoint(path)) for path in MODELS.glob("*/*.safetensors")}

    assert found["golden_sd15.safetensors"] == "sd15"
    assert found["golden_ace_step.safetensors"] == "ace_step"
    assert found["golden_wan_high_fp8_scaled.safetensors"] == "wan"
    assert found["golden_wan_vae.safetensors"] == "wan_vae"
    assert found["golden_umt5_fp8_scaled.safetensors"] == "umt5"
    assert found["golden_wan_lora_high.safetensors"] == "lora"


@settings(deadline=None)  # files on a disk that others use too
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(sorted(DTYPES.values(), key=str)), min_size=6, max_size=6),
)
def test_what_is_written_is_read(tmp_path_factory, shapes, dtypes):
    path = tmp_path_factory.mktemp("files") / "any.safetensors"
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    save_file(tensors, path, metadata={"note": "x"})

    checkpoint = open_checkpoint(path)

    assert checkpoint.metadata == {"note": "x"}
    for name, tensor in tensors.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float())


def test_a_section_is_the_file_seen_through_a_prefix(tmp_path):
    save_file({"vae.a": torch.ones(2), "model.b": torch.zeros(3)}, tmp_path / "x.safetensors")

    section = open_checkpoint(tmp_path / "x.safetensors").section("vae.")

    assert list(section) == ["a"]
    assert section.tensor("a").tolist() == [1.0, 1.0]


def test_opening_a_big_file_does_not_read_it(tmp_path):
    path = tmp_path / "big.safetensors"
    size = 3 * 2**30
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # sparse: no disk is used either
    before = _resident_bytes()

    tensor = open_checkpoint(path).tensor("w")

    assert tensor.numel() == size
    assert _resident_bytes() - before < 64 * 2**20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (save({"a": torch.ones(64)})[:-10], "truncated"),
        (save({"a": torch.ones(64)})[:20], "truncated"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04" + b"\0" * 60, "pickle"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"GGUF" + b"\3" * 60, "GGUF"),
        (b"\xff" * 64, "not a safetensors"),
        (b"\x04" + b"\0" * 7 + b"[[]]", "not an object"),
        (b"\x04" + b"\0" * 7 + b"{{{{", "not JSON"),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(tmp_path, content, said):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(ModelFileUnusable, match=said) as refused:
        open_checkpoint(path)

    assert refused.value.details["file"] == "bad.safetensors"
    assert str(tmp_path) not in refused.value.message


def test_a_header_that_lies_about_a_size_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "lie.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)

    with pytest.raises(ModelFileUnusable, match="damaged"):
        open_checkpoint(tmp_path / "lie.safetensors")


def test_a_file_of_another_family_is_refused_by_its_name():
    vae = open_checkpoint(MODELS / "vae" / "golden_wan_vae.safetensors")

    with pytest.raises(ModelFileUnusable, match=r"is a Wan 2.1 VAE; here a Wan diffusion model is needed"):
        demand(vae, ["wan"])


def test_a_missing_tensor_is_named():
    vae = open_checkpoint(MODELS / "vae" / "golden_wan_vae.safetensors")

    with pytest.raises(ModelFileUnusable, match=r"lacks the tensor decoder\.nothing"):
        vae.tensor("decoder.nothing")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

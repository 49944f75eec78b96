"""Files get ComfyUI's names, never leave their folder, and have their final name only when they are complete."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.engine.naming import OutsideFolder, fill_tokens, next_counter, split_prefix
from comfyfleet.testing.clock import FakeClock
from support.engine_world import folders_below

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "nodes" / "files.json").read_text())


def write(folders, prefix: str, extension: str = "png", count: int = 1, **options) -> list[dict]:
    shown = []
    for number in range(count):
        name = folders.next_output(prefix, extension, batch_number=number, **options)
        Path(name.staging_path).write_bytes(b"x")
        folders.commit(name)
        shown.append(name.shown())
    return shown


def test_names_and_counters_are_those_comfyui_gave_in_one_folder(tmp_path: Path) -> None:
    folders = folders_below(tmp_path)
    for step in GOLDEN["save_image"]["sequence_in_one_fresh_output_folder"]:
        for name in step["files_put_there_before"]:
            (folders.paths.output / name).touch()
        if "raises" in step:
            with pytest.raises(OutsideFolder):
                write(folders, step["filename_prefix"])
            continue
        given_names = write(folders, step["filename_prefix"], count=step["images"], width=16, height=8)
        assert given_names == step["result"], step


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    folders = folders_below(tmp_path)
    name = folders.next_output("clip", "mp4")
    Path(name.staging_path).write_bytes(b"half of it")

    assert not Path(name.path).exists()
    folders.commit(name)
    assert Path(name.path).read_bytes() == b"half of it"


def test_what_a_killed_engine_left_half_done_is_swept_away(tmp_path: Path) -> None:
    folders = folders_below(tmp_path)
    kept = write(folders, "kept")[0]["filename"]
    Path(folders.next_output("lost", "mp4").staging_path).write_bytes(b"half of it")
    write(folders, "old", kind="temp")

    folders_below(tmp_path).sweep()

    assert [path.name for path in folders.paths.output.rglob("*") if path.is_file()] == [kept]
    assert not list(folders.paths.temp.iterdir())


def test_tokens_are_filled_with_sizes_and_the_local_time() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001 - local time on purpose

    prefix = "%year%-%month%-%day%/%hour%%minute%%second%_%width%x%height%_%batch_num%"

    assert fill_tokens(prefix, width=16, height=8, now=now) == "2026-01-02/030405_16x8_%batch_num%"
    assert fill_tokens("%date:yyyy%", width=1, height=1, now=now) == "%date:yyyy%"


def test_a_link_out_of_the_output_folder_is_not_followed(tmp_path: Path) -> None:
    folders = folders_below(tmp_path)
    (folders.paths.output / "door").symlink_to(tmp_path)

    with pytest.raises(PermissionError):
        folders.next_output("door/x", "png")


@given(prefix=st.text(alphabet="ab./%_\\ ", max_size=12))
def test_no_prefix_leads_out_of_the_folder(prefix: str) -> None:
    try:
        subfolder, name, _ = split_prefix(prefix)
    except OutsideFolder:
        return
    assert ".." not in subfolder.split("/")
    assert name not in ("..", "")
    assert not subfolder.startswith("/")


@given(listing=st.lists(st.text(alphabet="ab_0123456789.", max_size=12)))
def test_a_counter_is_never_one_that_is_taken(listing: list[str]) -> None:
    counter = next_counter(listing, "a", 1)

    assert f"a_{counter:05}_.png" not in listing


def test_a_real_model_hides_the_miniature_of_its_name(tmp_path: Path) -> None:
    folders = folders_below(tmp_path, FakeClock())
    miniature = tmp_path / "miniatures" / "vae" / "wan.safetensors"
    miniature.parent.mkdir(parents=True)
    miniature.write_bytes(b"tiny")
    (miniature.parent / "only_small.safetensors").write_bytes(b"tiny")

    assert folders.is_miniature("vae", "wan.safetensors")

    real = tmp_path / "models" / "vae" / "wan.safetensors"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"real")
    assert folders.model_path("vae", "wan.safetensors") == str(real)
    assert not folders.is_miniature("vae", "wan.safetensors")
    assert folders.model_names("vae") == ["only_small.safetensors", "wan.safetensors"]


def test_model_folders_go_by_comfyuis_names_and_sub_folders(tmp_path: Path) -> None:
    folders = folders_below(tmp_path)
    for place in ("clip/a.safetensors", "text_encoders/deep/b.safetensors", "text_encoders/readme.txt", "unet/c.sft"):
        path = tmp_path / "models" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    assert folders.model_names("text_encoders") == ["a.safetensors", "deep/b.safetensors"]
    assert folders.model_names("diffusion_models") == ["c.sft"]
    with pytest.raises(FileNotFoundError):
        folders.model_path("text_encoders", "../unet/c.sft")


def test_a_file_is_a_miniature_when_its_own_metadata_says_so(tmp_path: Path) -> None:
    folders = folders_below(tmp_path)
    header = json.dumps({"__metadata__": {"miniature": "true"}}).encode()
    path = tmp_path / "models" / "vae" / "x.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header)

    assert folders.is_miniature("vae", "x.safetensors")

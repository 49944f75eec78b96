"""Miniature files: made once, the same everywhere, never over a file that somebody put there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.miniatures import ensure
from comfyfleet.engine.miniatures.provision import FILES, RECIPE
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.families import family_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniatures")
    ensure(root)
    return root


def test_every_file_is_of_its_family_and_says_that_it_is_a_miniature(made):
    families = {name: family_of(open_checkpoint(made / name)) for name in FILES}

    assert set(families.values()) == {"umt5", "wan_vae", "wan", "lora", "sd15"} | (
        set(families.values()) & {"ace_step"}
    )
    assert all(open_checkpoint(made / name).is_miniature for name in FILES)
    assert {path.relative_to(made).as_posix() for path in made.rglob("*.safetensors")} == set(FILES)


def test_a_second_time_there_is_nothing_to_do(made):
    assert ensure(made) == []


def test_the_same_seed_makes_the_same_tensors(made, tmp_path):
    ensure(tmp_path)

    for name in FILES:
        ours, theirs = open_checkpoint(tmp_path / name), open_checkpoint(made / name)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours.tensor(each).float(), theirs.tensor(each).float()) for each in ours)


def test_a_real_file_is_never_replaced_and_an_old_miniature_is(tmp_path):
    stale, real, broken, *_ = FILES
    for name in (real, stale, broken):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(1)}, tmp_path / real)
    save_file({"a": torch.ones(1)}, tmp_path / stale, metadata={"miniature": "true", "recipe": "0"})
    (tmp_path / broken).write_bytes(b"half a download")

    made = ensure(tmp_path)

    assert real not in made
    assert broken not in made
    assert list(open_checkpoint(tmp_path / real)) == ["a"]
    assert open_checkpoint(tmp_path / stale).metadata["recipe"] == RECIPE


@pytest.mark.slow
def test_two_processes_at_once_make_one_set(tmp_path):
    program = f"from comfyfleet.engine.miniatures import ensure; print(len(ensure({str(tmp_path)!r})))"
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]

    counts = sorted(int(process.communicate()[0]) for process in both)

    assert [process.returncode for process in both] == [0, 0]
    assert counts == [0, len(FILES)]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") and path.name != ".lock"]

"""The clean-up rule: what goes, in which order, and what never does."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.provision.clean import DAY_S, Rule, Stored, candidates, make_room, models_in, models_to_drop
from comfyfleet.worker.housekeeping import CleanedFolders, clean

NOW = 1_000_000_000.0
RULE = Rule(min_free_bytes=512 * 10**6)


def a_file(name: str, *, hours: float, size_bytes: int = 100) -> Stored:
    return Stored(path=Path("/out") / name / "f.png", size_bytes=size_bytes, used_at=NOW - hours * 3600)


def nothing_kept(_path: Path) -> bool:
    return False


def test_only_files_older_than_a_day_go_oldest_first():
    files = [a_file("young", hours=23.9), a_file("old", hours=25), a_file("older", hours=99)]

    going = candidates(files, RULE, now=NOW, is_kept=nothing_kept)

    assert [file.path.parent.name for file in going] == ["older", "old"]


def test_a_file_of_a_running_or_unread_job_never_goes():
    files = [a_file("kept", hours=99), a_file("old", hours=25)]

    going = candidates(files, RULE, now=NOW, is_kept=lambda path: path.parent.name == "kept")

    assert [file.path.parent.name for file in going] == ["old"]


@given(st.lists(st.floats(0, 10 * DAY_S), max_size=20))
def test_whatever_there_is_nothing_young_goes(ages):
    files = [Stored(path=Path(f"/{n}"), size_bytes=1, used_at=NOW - age) for n, age in enumerate(ages)]

    going = candidates(files, RULE, now=NOW, is_kept=nothing_kept)

    assert all(NOW - file.used_at > DAY_S for file in going)
    assert [file.used_at for file in going] == sorted(file.used_at for file in going)


def test_cleaning_stops_as_soon_as_there_is_room(tmp_path):
    files = []
    for number in range(5):
        path = tmp_path / f"{number}"
        path.write_bytes(b"x")
        files.append(Stored(path=path, size_bytes=1, used_at=NOW))
    free = iter([0, 100, 600 * 10**6, 600 * 10**6])

    cleaned = make_room(files, RULE, tmp_path, free=lambda _path: next(free))

    assert cleaned.removed == (tmp_path / "0", tmp_path / "1")
    assert not cleaned.is_full
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_a_disk_that_stays_full_says_so(tmp_path):
    assert make_room([], RULE, tmp_path, free=lambda _path: 5).is_full


def test_models_go_by_least_recent_use_down_to_the_budget_but_never_one_in_use():
    models = [
        Stored(path=Path("/m/a.ckpt"), size_bytes=50, used_at=1),
        Stored(path=Path("/m/b.ckpt"), size_bytes=50, used_at=2),
        Stored(path=Path("/m/c.ckpt"), size_bytes=50, used_at=3),
    ]

    dropped = models_to_drop(models, 60, is_kept=lambda path: path.name == "a.ckpt")

    assert [model.path.name for model in dropped] == ["b.ckpt", "c.ckpt"]
    assert models_to_drop(models, 0, is_kept=nothing_kept) == []


def test_a_round_removes_old_outputs_on_a_real_disk_and_keeps_the_rest(tmp_path):
    for folder, age_hours in (("old", 48), ("kept", 48), ("young", 1)):
        path = tmp_path / "output" / folder / "song.mp3"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, (NOW - age_hours * 3600,) * 2)
        os.utime(path.parent, (NOW - age_hours * 3600,) * 2)
    folders = CleanedFolders(output=tmp_path / "output", engine=(), models=tmp_path / "models")

    cleaned = clean(folders, Rule(min_free_bytes=10**18), now=NOW, kept={"kept"})

    assert [path.parent.name for path in cleaned.removed] == ["old"]
    assert cleaned.is_full
    assert (tmp_path / "output" / "kept" / "song.mp3").exists()
    assert (tmp_path / "output" / "young" / "song.mp3").exists()


def test_a_download_under_way_is_no_model(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / ".a.safetensors.part").write_bytes(b"x")
    (tmp_path / "vae" / "b.safetensors").write_bytes(b"x")

    assert [model.path.name for model in models_in(tmp_path)] == ["b.safetensors"]


def test_the_rule_is_one_sentence():
    assert RULE.sentence() == (
        "Below 512.00 MB free, files older than 24 hours go, oldest first, until there is room; never one of a"
        " running or unread job. Models stay."
    )


def test_a_round_that_knows_not_what_is_kept_removes_no_output(tmp_path):
    folders = CleanedFolders(output=tmp_path / "output", engine=(), models=tmp_path / "models")
    old = folders.output / "job" / "a.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    os.utime(old, (NOW - 10 * DAY_S, NOW - 10 * DAY_S))

    clean(folders, Rule(min_free_bytes=10**18), now=NOW, kept=None)
    assert old.exists()

    clean(folders, Rule(min_free_bytes=10**18), now=NOW, kept=())
    assert not old.exists()

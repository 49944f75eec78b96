"""A kept file is at its name whole or not at all, whether or not something lay ready for it."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from comfyfleet.storage.drafts import Drafts

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".drafts" / "mine"


@asynccontextmanager
async def with_some_ready(folder: Path):
    """Drafts whose loop runs; something lies ready."""
    drafts = Drafts(folder)
    async with anyio.create_task_group() as loop:
        loop.start_soon(drafts.run)
        with anyio.fail_after(60):
            while len(ready(folder)) < 24:
                await anyio.lowlevel.checkpoint()
        yield drafts
        loop.cancel_scope.cancel()


def ready(folder: Path) -> dict[int, Path]:
    """What lies there, by inode."""
    return {path.stat().st_ino: path for path in folder.glob(".part-*")}


async def test_a_job_moves_what_lies_ready_and_makes_nothing(tmp_path: Path, folder: Path):
    async with with_some_ready(folder) as drafts:
        before = ready(folder)
        drafts.make_folders(f"{tmp_path}/job/music")
        drafts.place(b"song", f"{tmp_path}/job/music/song.mp3")

    song = tmp_path / "job" / "music" / "song.mp3"
    assert song.read_bytes() == b"song"
    for made in (song, song.parent, song.parent.parent):
        assert made.stat().st_ino in before
    assert len(ready(folder)) == len(before) - 3


async def test_without_anything_ready_all_is_made_at_once(tmp_path: Path, folder: Path):
    Drafts(folder).place(b"x", f"{tmp_path}/job/a/x.png")

    assert (tmp_path / "job" / "a" / "x.png").read_bytes() == b"x"
    assert ready(folder) == {}


async def test_who_needs_room_may_clean_here_at_any_time(tmp_path: Path, folder: Path):
    async with with_some_ready(folder) as drafts:
        shutil.rmtree(folder)
        drafts.make_folders(f"{tmp_path}/job")
        drafts.place(b"x", f"{tmp_path}/job/x.png")

    assert (tmp_path / "job" / "x.png").read_bytes() == b"x"


async def test_a_folder_that_holds_something_stays_as_it_is(tmp_path: Path, folder: Path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "earlier.png").write_bytes(b"kept")
    async with with_some_ready(folder) as drafts:
        drafts.make_folders(f"{tmp_path}/job")
        drafts.place(b"new", f"{tmp_path}/job/later.png")

    assert (tmp_path / "job" / "earlier.png").read_bytes() == b"kept"
    assert (tmp_path / "job" / "later.png").read_bytes() == b"new"


async def test_what_was_taken_is_made_again_once_half_is_gone(tmp_path: Path, folder: Path):
    async with with_some_ready(folder) as drafts:
        for number in range(4):
            drafts.place(b"x", f"{tmp_path}/{number}.png")
        assert len(ready(folder)) == 20
        drafts.renew()
        with anyio.fail_after(60):
            while len(ready(folder)) < 24:
                await anyio.lowlevel.checkpoint()


async def test_a_former_life_leaves_nothing(tmp_path: Path, folder: Path):
    async with with_some_ready(folder):
        pass
    Drafts(folder).clear()

    assert not folder.exists()


@pytest.mark.parametrize("is_ready", [True, False])
async def test_a_full_disk_is_told_and_leaves_neither_file_nor_part(tmp_path, folder, monkeypatch, is_ready):
    def is_full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with with_some_ready(folder) as drafts:
        used = drafts if is_ready else Drafts(folder)
        before = set(ready(folder).values())
        monkeypatch.setattr(os, "write", is_full)
        with pytest.raises(OSError, match="No space left"):
            used.place(b"x", f"{tmp_path}/x.png")

    assert not (tmp_path / "x.png").exists()
    assert set(ready(folder).values()) <= before


async def test_a_name_that_cannot_be_had_leaves_no_part(tmp_path: Path, folder: Path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        Drafts(folder).place(b"x", f"{tmp_path}/taken")

    assert ready(folder) == {}

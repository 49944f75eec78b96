"""The demo's checks can fail: a wrong file is called wrong, by what it really is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comfyfleet.cli.demo_checks import FilmFacts, SongFacts, film_faults, song_faults, vbr_level

SONG = SongFacts(
    codec="mp3",
    channels=2,
    sample_rate_hz=44100,
    duration_s=179.9,
    vbr_level=0,
    prompt={"1": {"class_type": "SaveAudioMP3"}},
)
FILM = FilmFacts(codec="h264", width=640, height=640, frames=81, fps=16.0)


def test_the_documents_song_and_film_pass() -> None:
    assert song_faults(SONG) == []
    assert film_faults(FILM) == []


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "flac"},
        {"channels": 1},
        {"sample_rate_hz": 48000},
        {"duration_s": 12.0},
        {"vbr_level": None},
        {"vbr_level": 4},
        {"prompt": None},
    ],
)
def test_any_other_song_is_called_wrong(change: dict[str, object]) -> None:
    assert len(song_faults(replace(SONG, **change))) == 1


@pytest.mark.parametrize("change", [{"codec": "vp9"}, {"width": 64}, {"frames": 80}, {"fps": 24.0}])
def test_any_other_film_is_called_wrong(change: dict[str, object]) -> None:
    assert len(film_faults(replace(FILM, **change))) == 1


@pytest.mark.parametrize(("quality", "level"), [(100, 0), (97, 0), (91, 0), (90, 1), (57, 4)])
def test_the_v_of_a_vbr_file_is_read_from_its_header(quality: int, level: int) -> None:
    header = b"junk" + b"Xing" + (0xF).to_bytes(4, "big") + bytes(4 + 4 + 100) + quality.to_bytes(4, "big")

    assert vbr_level(header) == level
    assert vbr_level(b"no header here") is None

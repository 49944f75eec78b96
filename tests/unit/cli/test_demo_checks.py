"""The demo's checks can fail: a wrong file is called wrong, by what it really is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comfyfleet.cli.demo_checks import FilmFacts, SongFacts, differ_in_bitrate, film_faults, has_vbr_header, song_faults

SONG = SongFacts(
    codec="mp3",
    channels=2,
    sample_rate_hz=44100,
    duration_s=179.9,
    is_vbr=True,
    kbps=262.0,
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
        {"is_vbr": False},
        {"kbps": 128.0},
        {"prompt": None},
    ],
)
def test_any_other_song_is_called_wrong(change: dict[str, object]) -> None:
    assert len(song_faults(replace(SONG, **change))) == 1


@pytest.mark.parametrize("change", [{"codec": "vp9"}, {"width": 64}, {"frames": 80}, {"fps": 24.0}])
def test_any_other_film_is_called_wrong(change: dict[str, object]) -> None:
    assert len(film_faults(replace(FILM, **change))) == 1


def test_vbr_is_what_the_header_says_and_the_frames_show() -> None:
    assert has_vbr_header(b"ID3....Xing....")
    assert not has_vbr_header(b"ID3....Info....")
    assert differ_in_bitrate([835, 1044, 836])
    assert not differ_in_bitrate([417, 418, 417])
    assert not differ_in_bitrate([])

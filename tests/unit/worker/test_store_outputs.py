"""Whatever a node names is kept under the request's id, described by its own bytes, and linked to; nothing else is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.ids import SeededIds
from comfyfleet.sealing import Sealer
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.drafts import Drafts
from comfyfleet.storage.local import LocalStorage
from comfyfleet.storage.long_uploads import long_uploads
from comfyfleet.storage.s3 import S3Storages
from comfyfleet.storage.upload_book import UploadBook
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.generation import GenerateInput, OutputEntry
from comfyfleet.worker.engines.client import HistoryEntry
from comfyfleet.worker.stages.destinations import Destinations
from comfyfleet.worker.stages.history_files import expected_folders, missing_files, read_made
from comfyfleet.worker.stages.store_outputs import StoreOutputs

pytestmark = pytest.mark.anyio


@dataclass
class AnEngine:
    """Folders as an engine has them, and the stage that reads them."""

    root: Path
    clock: FakeClock
    base64_max_bytes: int = 1_000_000

    @property
    def folders(self) -> dict[str, Path]:
        return {kind: self.root / "engine" / kind for kind in ("output", "temp", "input")}

    def path(self, name: str, kind: str = "output") -> Path:
        path = self.folders[kind] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    async def store(self, outputs: dict, request: GenerateInput | None = None, graph=None) -> list[OutputEntry]:
        rules = AddressRules()
        book = UploadBook(self.root / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
        async with GuardedFetcher(rules, self.clock) as fetcher, long_uploads(book, self.clock, SeededIds(1)) as long:
            stage = StoreOutputs(
                LocalStorage(self.root / "kept", "http://files.test", UrlSigner(b"k" * 32, self.clock), self.clock),
                Drafts(self.root / "drafts"),
                Destinations(None, S3Storages(self.clock, long), fetcher, tunnel_url=""),
                url_expires_s=3600,
                base64_max_bytes=self.base64_max_bytes,
            )
            made = read_made(HistoryEntry(outputs=outputs, prompt=[1, "p", graph or {}, {}, []]))
            return await stage.run(made, request_id="job-1", request=request or GenerateInput(), folders=self.folders)


@pytest.fixture
def engine(tmp_path: Path, clock: FakeClock) -> AnEngine:
    return AnEngine(tmp_path, clock)


def a_picture(path: Path, size: tuple[int, int] = (64, 48)) -> None:
    Image.new("RGB", size, "teal").save(path)


def a_film(path: Path, frames: int = 8) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=16)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())


def a_song(path: Path, seconds: float = 1.0) -> None:
    with av.open(str(path), "w") as container:
        audio = container.add_stream("libmp3lame", rate=44100, layout="stereo")
        time = np.arange(int(44100 * seconds)) / 44100
        wave = (0.5 * np.sin(440 * 2 * np.pi * time)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        for packet in audio.encode(frame):
            container.mux(packet)
        container.mux(audio.encode())


async def test_a_picture_is_kept_under_the_request_with_its_subfolder(engine: AnEngine) -> None:
    a_picture(engine.path("day/ComfyUI_00001_.png"))

    [output] = await engine.store(
        {"9": {"images": [{"filename": "ComfyUI_00001_.png", "subfolder": "day", "type": "output"}]}}
    )

    kept = Path(output.local_path)
    assert kept == engine.root / "kept" / "job-1" / "day" / "ComfyUI_00001_.png"
    assert output.url.startswith("http://files.test/files/job-1/day/ComfyUI_00001_.png?expires=")
    assert (output.kind, output.mime, output.width, output.height) == ("image", "image/png", 64, 48)
    assert output.sha256 == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert output.size_bytes == kept.stat().st_size
    assert (output.node_id, output.output_type, output.type, output.subfolder) == ("9", "images", "output", "day")
    assert engine.path("day/ComfyUI_00001_.png").exists()


async def test_a_film_under_images_is_told_to_be_a_film_and_gets_a_poster(engine: AnEngine) -> None:
    a_film(engine.path("video/ComfyUI_00003_.mp4"))

    [output] = await engine.store(
        {
            "98": {
                "images": [{"filename": "ComfyUI_00003_.mp4", "subfolder": "video", "type": "output"}],
                "animated": [True],
            }
        }
    )

    assert (output.output_type, output.kind, output.mime) == ("images", "video", "video/mp4")
    assert (output.width, output.height, output.fps, output.frames, output.duration_s) == (64, 48, 16.0, 8, 0.5)
    assert "/files/job-1/video/ComfyUI_00003_.mp4.poster.jpg?" in output.poster_url
    with Image.open(output.local_path + ".poster.jpg") as poster:
        assert poster.size == (64, 48)


async def test_a_song_gets_its_facts_and_a_waveform(engine: AnEngine) -> None:
    a_song(engine.path("song.mp3"))

    [output] = await engine.store({"59": {"audio": [{"filename": "song.mp3", "subfolder": "", "type": "output"}]}})

    assert (output.kind, output.channels, output.sample_rate) == ("audio", 2, 44100)
    assert output.duration_s == pytest.approx(1.0, abs=0.1)
    assert output.peaks is not None
    assert len(output.peaks) == 200
    assert max(output.peaks) == pytest.approx(0.5, abs=0.05)
    assert min(output.peaks[10:180]) > 0.4


async def test_files_under_any_key_are_kept_and_words_become_a_file(engine: AnEngine) -> None:
    for name in ("a.gif", "b.bin", "c.json"):
        engine.path(name).write_bytes(b"GIF89a" if name == "a.gif" else b"{}")
    engine.path("mesh/d.glb").write_bytes(b"glTF" + bytes(20))

    outputs = await engine.store(
        {
            "1": {"gifs": [{"filename": "a.gif", "type": "output", "format": "image/gif"}]},
            "2": {"files": [{"filename": "b.bin"}, {"filename": "c.json"}]},
            "3": {"3d": [{"filename": "d.glb", "subfolder": "mesh", "type": "output"}]},
            "4": {"text": ["a cat", "a dog"]},
            "5": {"result": ["mesh/d.glb", None, None]},
            "6": {"batches": [[{"filename": "b.bin"}], [[{"filename": "c.json"}]], 7, None, []]},
        }
    )

    assert [output.filename for output in outputs] == [
        "a.gif",
        "b.bin",
        "c.json",
        "d.glb",
        "text_4_0.txt",
        "text_4_1.txt",
        "d.glb",
        "b.bin",
        "c.json",
    ]
    assert not any(output.error for output in outputs)
    assert outputs[4].text == "a cat"
    assert Path(outputs[5].local_path).read_text() == "a dog"
    assert outputs[3].mime == "model/gltf-binary"


async def test_a_file_outside_the_engines_folders_is_never_read(engine: AnEngine, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    engine.path("x").write_text("x")
    engine.path("link.txt").symlink_to(tmp_path / "secret.txt")

    outputs = await engine.store(
        {
            "1": {
                "files": [
                    {"filename": "../../secret.txt"},
                    {"filename": str(tmp_path / "secret.txt")},
                    {"filename": "secret.txt", "subfolder": "../.."},
                    {"filename": "link.txt"},
                    {"filename": "x", "type": "elsewhere"},
                ]
            }
        }
    )

    assert all(output.error and not output.url and output.size_bytes is None for output in outputs)
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


async def test_equal_names_in_output_and_temp_do_not_collide(engine: AnEngine) -> None:
    a_picture(engine.path("same.png"), (10, 10))
    a_picture(engine.path("same.png", "temp"), (20, 20))

    outputs = await engine.store(
        {"1": {"images": [{"filename": "same.png", "type": "output"}, {"filename": "same.png", "type": "temp"}]}}
    )

    assert [output.width for output in outputs] == [10, 20]
    assert len({output.local_path for output in outputs}) == 2


async def test_an_engine_that_writes_a_name_again_does_not_change_what_was_kept(engine: AnEngine) -> None:
    big = engine.path("film.bin")
    big.write_bytes(b"first" * 1_000_000)
    graph = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "film%batch_num%"}}}

    [output] = await engine.store({"1": {"files": [{"filename": "film.bin"}]}}, graph=graph)
    with big.open("r+b") as file:
        file.write(b"other")

    assert Path(output.local_path).read_bytes().startswith(b"first")


async def test_base64_comes_only_when_asked_for_and_under_the_cap(engine: AnEngine) -> None:
    engine.base64_max_bytes = 10
    engine.path("small.txt").write_text("12345678")
    engine.path("more.txt").write_text("12345678")

    plain = await engine.store({"1": {"files": [{"filename": "small.txt"}]}})
    asked = await engine.store(
        {"1": {"files": [{"filename": "small.txt"}, {"filename": "more.txt"}]}},
        GenerateInput(return_outputs_as_base64=True),
    )

    assert plain[0].data == ""
    assert (asked[0].data, asked[0].mimetype) == ("MTIzNDU2Nzg=", "text/plain")
    assert asked[1].data == ""
    assert "limit of 10 bytes" in asked[1].error
    assert asked[1].url


async def test_names_that_differ_in_a_letter_links_cannot_hold_are_all_kept_and_none_over_another(engine) -> None:
    """A prefix from Windows is one name here, backslash and all; a line break is a letter like others."""
    names = ["video\\film.txt", "video/film.txt", "two\nlines.txt", "two\tlines.txt", "two_lines.txt"]
    for name in names:
        engine.path(name).write_text(name)

    outputs = await engine.store(
        {
            "9": {
                "files": [
                    {"filename": name.rpartition("/")[2], "subfolder": name.rpartition("/")[0], "type": "output"}
                    for name in names
                ]
            }
        }
    )

    assert [Path(output.local_path).read_text() for output in outputs] == names
    assert len({output.local_path for output in outputs}) == len(names)
    assert "/files/job-1/video/film.txt?" in outputs[0].url
    assert not any("%0A" in output.url or "%5C" in output.url for output in outputs)


async def test_a_type_that_is_no_folder_cannot_put_a_file_anywhere(engine: AnEngine) -> None:
    engine.path("a.txt").write_text("mine")
    named = {"filename": "a.txt", "subfolder": ""}

    kept, stray = await engine.store(
        {"9": {"files": [{**named, "type": "output"}, {**named, "type": "../../../elsewhere"}]}}
    )

    assert Path(kept.local_path).read_text() == "mine"
    assert stray.error


async def test_a_film_whose_name_has_no_room_for_a_posters_comes_without_one(engine: AnEngine) -> None:
    name = "x" * 251 + ".mp4"
    a_film(engine.path(name))

    [output] = await engine.store({"9": {"images": [{"filename": name, "subfolder": "", "type": "output"}]}})

    assert (output.error, output.kind, output.poster_url) == ("", "video", "")
    assert Path(output.local_path).stat().st_size == output.size_bytes


async def test_a_missing_file_says_so_and_the_others_are_kept(engine: AnEngine) -> None:
    a_picture(engine.path("there.png"))
    named = {"1": {"images": [{"filename": "gone.png", "type": "output"}, {"filename": "there.png", "type": "output"}]}}

    outputs = await engine.store(named)

    assert "not there" in outputs[0].error
    assert outputs[1].url
    made = read_made(HistoryEntry(outputs=named))
    assert [one.filename for one in missing_files(made.files, engine.folders)] == ["gone.png"]


def test_the_folders_of_plain_prefixes_are_expected_and_nothing_outside():
    prefixes = ("music/song", "plain", "a/b/c", "%date%/x", "../up/x", "/abs/x", "twice//x", 7)
    graph = {str(n): {"class_type": "Save", "inputs": {"filename_prefix": one}} for n, one in enumerate(prefixes)}

    assert expected_folders(graph) == {"music", "a/b", "twice"}


async def test_a_link_out_of_the_engines_folder_is_not_kept_and_one_within_it_is(engine: AnEngine, tmp_path: Path):
    secret = tmp_path / "secret.png"
    a_picture(secret)
    a_picture(engine.path("real.png"))
    engine.path("out.png").symlink_to(secret)
    engine.path("in.png").symlink_to(engine.path("real.png"))
    names = [{"filename": name, "subfolder": "", "type": "output"} for name in ("out.png", "in.png")]

    out, inside = await engine.store({"9": {"images": names}})

    assert out.error
    assert not Path(out.local_path).exists()
    assert inside.sha256 == hashlib.sha256(engine.path("real.png").read_bytes()).hexdigest()

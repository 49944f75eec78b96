"""What save and load nodes write and read: ComfyUI's bytes, names, codecs, tags."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from comfyfleet.engine.events import NodeProgress
from comfyfleet.engine.executor import Job
from comfyfleet.engine.media.film import save_mp4
from comfyfleet.engine.media.sound import save_sound
from comfyfleet.engine.registry import Interrupted, NodeRegistry, NodeRun, integer, real
from comfyfleet.engine.values import Audio, Video
from support.engine_world import EngineWorld, node

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "nodes" / "files.json").read_text())
RATE_HZ = 44100


@pytest.fixture
def world(tmp_path: Path) -> EngineWorld:
    world = EngineWorld(tmp_path)
    world.registry.add_all(sources())
    return world


def sources() -> NodeRegistry:
    """Frames and tones, so that there is something to save."""
    registry = NodeRegistry()

    @registry.node("Gradient", inputs={name: integer(1) for name in ("frames", "height", "width")}, outputs=["IMAGE"])
    def gradient(run: NodeRun, *, frames: int, height: int, width: int) -> tuple[torch.Tensor]:
        row = torch.linspace(0, 1, width).expand(frames, height, width)
        shade = (torch.arange(frames) / frames).reshape(-1, 1, 1).expand_as(row)
        return (torch.stack([row, row.flip(2), shade], dim=-1),)

    @registry.node(
        "Tone",
        inputs={"seconds": real(1.0, 0, 100)}
        | {name: integer(1, required=False) for name in ("channels", "batch", "rate")},
        outputs=["AUDIO"],
    )
    def tone(run: NodeRun, *, seconds: float, channels: int = 2, batch: int = 1, rate: int = RATE_HZ) -> tuple[Audio]:
        time = torch.arange(int(seconds * rate)) / rate
        waves = [0.4 * torch.sin(2 * torch.pi * (220 * (1 + n)) * time) for n in range(channels * batch)]
        return (Audio(waveform=torch.stack(waves).reshape(batch, channels, -1), sample_rate_hz=rate),)

    return registry


def output(world: EngineWorld, shown: dict) -> Path:
    root = world.folders.paths.root(shown["type"])
    return root / shown["subfolder"] / shown["filename"]


EXTRA = {"workflow": {"nodes": [], "title": "Übung 音"}}


# Pictures


def test_a_png_has_comfyuis_bytes_and_texts(world: EngineWorld) -> None:
    values = torch.tensor(GOLDEN["save_image"]["values_in"])[:, :, None].expand(-1, -1, 3)
    registry = NodeRegistry()
    registry.node("Values", inputs={}, outputs=["IMAGE"])(lambda run: (values[None],))
    world.registry.add_all(registry)
    graph = {"1": node("Values"), "2": node("SaveImage", images=["1", 0], filename_prefix="p")}

    outcome = world.run(graph, extra_pnginfo=EXTRA)

    with Image.open(output(world, outcome.outputs["2"]["images"][0])) as picture:
        picture.load()
    assert np.asarray(picture)[:, :, 0].tolist() == GOLDEN["save_image"]["bytes_out"]
    assert picture.mode == GOLDEN["save_image"]["png"]["mode"]
    assert list(picture.text) == GOLDEN["save_image"]["text_chunk_key_order"]
    assert json.loads(picture.text["prompt"]) == graph
    assert json.loads(picture.text["workflow"]) == EXTRA["workflow"]


def test_a_batch_gets_a_file_each_and_previews_go_to_the_temporary_folder(world: EngineWorld) -> None:
    outcome = world.run(
        {
            "1": node("Gradient", frames=3, height=8, width=16),
            "2": node("SaveImage", images=["1", 0], filename_prefix="b_%width%x%height%"),
            "3": node("PreviewImage", images=["1", 0]),
        }
    )

    names = [shown["filename"] for shown in outcome.outputs["2"]["images"]]
    assert names == [f"b_16x8_{n:05}_.png" for n in (1, 2, 3)]
    previews = outcome.outputs["3"]["images"]
    assert {shown["type"] for shown in previews} == {"temp"}
    assert all(output(world, shown).is_file() for shown in previews)


def test_an_animated_webp_holds_all_frames_and_the_prompt(world: EngineWorld) -> None:
    outcome = world.run(
        {
            "1": node("Gradient", frames=4, height=16, width=16),
            "2": node("SaveAnimatedWEBP", images=["1", 0], filename_prefix="w", fps=8.0, lossless=True, quality=80,
                      method="default"),
        },
        extra_pnginfo=EXTRA,
    )  # fmt: skip

    ui = outcome.outputs["2"]
    with Image.open(output(world, ui["images"][0])) as picture:
        assert (picture.n_frames, ui["animated"]) == (4, [True])
        exif = picture.getexif()
    assert exif[0x0110].startswith('prompt:{"1"')
    assert exif[0x010F].startswith("workflow:")


def test_a_loaded_picture_is_what_was_saved_and_its_mask_its_transparency(world: EngineWorld) -> None:
    pixels = np.zeros((4, 6, 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    pixels[0, 0, 3] = 51
    Image.fromarray(pixels).save(world.folders.paths.input / "in.png")
    node_of = world.registry["LoadImage"].function

    class Run:
        folders = world.folders

    image, mask = node_of(Run(), image="in.png")
    assert (tuple(image.shape), tuple(mask.shape)) == ((1, 4, 6, 3), (1, 4, 6))
    assert image[0, 0, 0].tolist() == pytest.approx([200 / 255, 0, 0])
    assert mask[0, 0, 0] == pytest.approx(1 - 51 / 255)
    assert mask[0, 1, 1] == 0


@pytest.mark.parametrize(
    ("width", "height", "crop", "shape"),
    [(8, 4, "disabled", (4, 8)), (0, 4, "disabled", (4, 8)), (8, 0, "disabled", (4, 8)), (4, 4, "center", (4, 4)),
     (0, 0, "disabled", (8, 16))],
)  # fmt: skip
@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"])
def test_scaling_keeps_what_it_is_told_to_keep(
    world: EngineWorld, method: str, width: int, height: int, crop: str, shape: tuple[int, int]
) -> None:
    outcome = world.run(
        {
            "1": node("Gradient", frames=2, height=8, width=16),
            "2": node("ImageScale", image=["1", 0], upscale_method=method, width=width, height=height, crop=crop),
            "3": node("SaveImage", images=["2", 0], filename_prefix="s"),
        }
    )

    with Image.open(output(world, outcome.outputs["3"]["images"][0])) as picture:
        assert (picture.height, picture.width) == shape


def test_pictures_are_inverted_blurred_batched_and_taken_out(world: EngineWorld) -> None:
    nodes = world.registry
    ramp = torch.linspace(0, 1, 16).expand(2, 8, 16)[..., None].expand(-1, -1, -1, 3)
    run = SimpleNamespace(folders=world.folders, check_stop=lambda: None)
    (inverted,) = nodes["ImageInvert"].function(run, image=ramp)
    (blurred,) = nodes["ImageBlur"].function(run, image=ramp, blur_radius=2, sigma=1.0)
    (batch,) = nodes["ImageBatch"].function(None, image1=ramp, image2=torch.ones(1, 32, 32, 3))
    (repeated,) = nodes["RepeatImageBatch"].function(None, image=ramp, amount=3)
    (taken,) = nodes["ImageFromBatch"].function(None, image=batch, batch_index=9, length=4)

    assert torch.equal(inverted + ramp, torch.ones_like(ramp))
    assert blurred.shape == ramp.shape
    assert torch.allclose(blurred[:, 4, 4:12], ramp[:, 4, 4:12], atol=1e-5), "a ramp stays a ramp away from its edges"
    assert tuple(batch.shape) == (3, 8, 16, 3)
    assert len(repeated) == 6
    assert torch.equal(taken, batch[2:])


def test_pictures_for_a_socket_are_sent_whole_each_time_and_written_nowhere(world: EngineWorld) -> None:
    graph = {"1": node("Gradient", frames=2, height=8, width=16), "2": node("SaveImageWebsocket", images=["1", 0])}
    told: list = []
    for _ in range(2):
        job = Job(prompt_id="p", graph=graph, outputs=["2"], extra_pnginfo={}, wants_previews=True)
        world.executor.run(job, told.append, lambda: False)

    sent = [event for event in told if isinstance(event, NodeProgress)]
    assert [(event.value, event.maximum) for event in sent] == [(0, 2), (1, 2)] * 2
    with Image.open(io.BytesIO(sent[0].preview)) as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 8))
    assert world.output_files() == []


def test_whatever_comes_is_shown_as_text(world: EngineWorld) -> None:
    outcome = world.run(
        {
            "1": node("PrimitiveInt", value=64),
            "2": node("PreviewAny", source=["1", 0]),
            "3": node("Gradient", frames=1, height=1, width=1),
            "4": node("PreviewAny", source=["3", 0]),
            "5": node("PrimitiveBoolean", value="yes"),
            "6": node("PreviewAny", source=["5", 0]),
        }
    )

    assert outcome.outputs["2"] == {"text": ["64"]}
    assert outcome.outputs["6"] == {"text": ["True"]}
    assert outcome.outputs["4"]["text"][0].startswith("tensor(")


# Films


@pytest.mark.parametrize(
    "case", GOLDEN["save_video"], ids=lambda case: f"{case['width']}x{case['height']}@{case['fps']}"
)
def test_an_mp4_reads_back_as_comfyuis_does(world: EngineWorld, case: dict) -> None:
    outcome = world.run(
        {
            "1": node("Gradient", frames=case["frames"], height=case["height"], width=case["width"]),
            "2": node("CreateVideo", images=["1", 0], fps=case["fps"]),
            "3": node("SaveVideo", video=["2", 0], filename_prefix="video/ComfyUI", format="auto", codec="auto"),
        },
        extra_pnginfo=EXTRA,
    )

    if "raises" in case:
        assert outcome.failure.exception_type.endswith(case["raises"])
        assert world.output_files() == []
        return
    ui = outcome.outputs["3"]
    assert ui["animated"] == case["ui"]["animated"]
    assert ui["images"][0]["subfolder"] == "video"
    (golden,) = case["streams"]
    with av.open(str(output(world, ui["images"][0]))) as container:
        stream = container.streams.video[0]
        assert container.format.name == case["container"]
        assert sorted(container.metadata) == case["metadata_keys"]
        assert json.loads(container.metadata["workflow"]) == EXTRA["workflow"]
        assert (stream.codec_context.name, stream.profile) == (golden["codec"], golden["profile"])
        assert (str(stream.time_base), str(stream.average_rate)) == (golden["time_base"], golden["average_rate"])
        assert (stream.width, stream.height, stream.pix_fmt) == (golden["width"], golden["height"], golden["pix_fmt"])
        assert len(list(container.decode(stream))) == golden["decoded_frames"]


def test_a_film_can_have_sound_cut_to_its_length(tmp_path: Path) -> None:
    frames = torch.zeros(8, 16, 16, 3)
    sound = Audio(waveform=torch.zeros(1, 2, RATE_HZ * 5), sample_rate_hz=RATE_HZ)
    path = tmp_path / "x.mp4"

    save_mp4(str(path), Video(frames=frames, fps=16, audio=sound), {})

    with av.open(str(path)) as container:
        audio = container.streams.audio[0]
        assert (audio.codec_context.name, audio.channels) == ("aac", 2)
        assert container.duration / av.time_base == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("codec", ["vp9", "av1"])
def test_a_webm_reads_back(world: EngineWorld, codec: str) -> None:
    outcome = world.run(
        {
            "1": node("Gradient", frames=3, height=64, width=64),
            "2": node("SaveWEBM", images=["1", 0], filename_prefix="w", codec=codec, fps=24.0, crf=32.0),
        }
    )

    assert outcome.failure is None, outcome.failure
    with av.open(str(output(world, outcome.outputs["2"]["images"][0]))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name.endswith({"vp9": "vp9", "av1": "av1"}[codec]) or "av1" in stream.codec.name
        assert len(list(container.decode(stream))) == 3
        assert any(name.lower() == "prompt" for name in container.metadata)


# Sound


MP3_CASES = [case for case in GOLDEN["save_audio_mp3"] if "quality" in case]


@pytest.mark.parametrize("case", MP3_CASES, ids=lambda case: f"{case['channels']}-{case['quality']}")
def test_an_mp3_reads_back_as_comfyuis_does(world: EngineWorld, case: dict) -> None:
    outcome = world.run(
        {
            "1": node("Tone", seconds=case["samples_in"] / RATE_HZ, channels=case["channels"]),
            "2": node("SaveAudioMP3", audio=["1", 0], filename_prefix="audio/tone", quality=case["quality"]),
        },
        extra_pnginfo=EXTRA,
    )

    (golden,) = case["streams"]
    path = output(world, outcome.outputs["2"]["audio"][0])
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert container.format.name == case["container"]
        assert sorted(container.metadata) == case["metadata_keys"]
        assert json.loads(container.metadata["prompt"])["2"]["class_type"] == "SaveAudioMP3"
        assert container.duration == case["duration_us"]
        assert (stream.layout.name, stream.codec_context.sample_rate) == (golden["layout"], golden["sample_rate"])
        assert sum(frame.samples for frame in container.decode(stream)) == golden["decoded_samples"]
        bit_rate = container.bit_rate
    if case["quality"] == "V0":
        assert b"Xing" in path.read_bytes()[:8192], "a variable rate has a Xing header, a constant one an Info header"
    else:
        assert b"Info" in path.read_bytes()[:8192]
        assert bit_rate == pytest.approx(int(case["quality"][:-1]) * 1000, rel=0.1)


def test_v0_is_the_best_variable_rate(tmp_path: Path) -> None:
    path = tmp_path / "noise.mp3"
    noise = 0.2 * torch.randn(2, 2 * RATE_HZ, generator=torch.Generator().manual_seed(0))

    save_sound(str(path), noise, RATE_HZ, form="mp3", quality="V0", texts={})

    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux(audio=0) if packet.size]
    assert len(set(sizes)) > 1
    assert sum(sizes) * 8 / 2 > 220_000, "noise needs nearly all that MP3 has"


@pytest.mark.parametrize("form", ["mp3", "flac", "opus"])
def test_encoding_sound_can_be_stopped_each_second(tmp_path: Path, form: str) -> None:
    blocks = []

    def stop_at_the_third() -> None:
        blocks.append(1)
        if len(blocks) == 3:
            raise Interrupted

    silence = torch.zeros(2, 20 * RATE_HZ)
    with pytest.raises(Interrupted):
        save_sound(
            str(tmp_path / "x"), silence, RATE_HZ, form=form, quality="V0", texts={}, before_block=stop_at_the_third
        )

    assert len(blocks) == 3


def test_a_batch_of_sounds_gets_a_file_each(world: EngineWorld) -> None:
    outcome = world.run(
        {
            "1": node("Tone", seconds=0.2, batch=2),
            "2": node("SaveAudioMP3", audio=["1", 0], filename_prefix="audio/tone", quality="V0"),
        }
    )

    assert [shown["filename"] for shown in outcome.outputs["2"]["audio"]] == ["tone_00001_.mp3", "tone_00002_.mp3"]


@pytest.mark.parametrize(("rate", "written"), [(44100, 48000), (16000, 16000), (96000, 48000)])
def test_opus_has_one_of_its_own_rates(world: EngineWorld, rate: int, written: int) -> None:
    outcome = world.run(
        {
            "1": node("Tone", seconds=0.5, rate=rate),
            "2": node("SaveAudioOpus", audio=["1", 0], filename_prefix="o", quality="128k"),
        }
    )

    assert outcome.failure is None, outcome.failure
    with av.open(str(output(world, outcome.outputs["2"]["audio"][0]))) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name in ("opus", "libopus")
        assert stream.codec_context.sample_rate == 48000 or stream.codec_context.sample_rate == written
        assert container.duration / av.time_base == pytest.approx(0.5, abs=0.05)


def test_flac_keeps_every_sample_and_previews_are_flac(world: EngineWorld) -> None:
    outcome = world.run(
        {
            "1": node("Tone", seconds=0.25),
            "2": node("SaveAudio", audio=["1", 0], filename_prefix="f"),
            "3": node("PreviewAudio", audio=["1", 0]),
        }
    )
    path = output(world, outcome.outputs["2"]["audio"][0])
    (world.folders.paths.input / "f.flac").write_bytes(path.read_bytes())
    assert outcome.outputs["3"]["audio"][0]["type"] == "temp"

    again = world.run(
        {"1": node("LoadAudio", audio="f.flac"), "2": node("SaveAudio", audio=["1", 0], filename_prefix="again")}
    )

    assert again.status == "success"
    with av.open(str(path)) as first, av.open(str(output(world, again.outputs["2"]["audio"][0]))) as second:
        one = np.concatenate([frame.to_ndarray() for frame in first.decode(audio=0)], axis=1)
        two = np.concatenate([frame.to_ndarray() for frame in second.decode(audio=0)], axis=1)
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1


def test_a_file_without_sound_is_refused_by_the_node(world: EngineWorld) -> None:
    Image.new("RGB", (4, 4)).save(world.folders.paths.input / "x.mp4", format="PNG")

    outcome = world.run(
        {"1": node("LoadAudio", audio="x.mp4"), "2": node("SaveAudio", audio=["1", 0], filename_prefix="f")}
    )

    assert outcome.failure.node_id == "1"

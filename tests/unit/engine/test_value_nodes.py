"""Latents, conditionings and plain values: shapes and numbers as ComfyUI gives them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comfyfleet.engine.nodes import all_nodes
from comfyfleet.engine.nodes.pieces import join
from comfyfleet.engine.nodes.scaling import scale
from comfyfleet.engine.registry import Interrupted
from comfyfleet.engine.values import ConditioningEntry, Latent
from support.engine_world import EngineWorld, node

GOLDENS = Path(__file__).parents[2] / "goldens" / "nodes"
SHAPES = json.loads((GOLDENS / "latent_shapes.json").read_text())
NODES = all_nodes()


def call(name: str, **inputs):
    return NODES[name].function(None, **inputs)[0]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in SHAPES.items() for case in cases])
def test_an_empty_latent_has_comfyuis_shape(name: str, case: dict) -> None:
    inputs = {key: value for key, value in case.items() if key not in ("shape", "keys")}

    latent = call(name, **inputs)

    assert list(latent.samples.shape) == case["shape"]
    assert not latent.samples.any()


def test_zeroing_out_a_conditioning_keeps_its_shape_and_strength_and_leaves_the_original() -> None:
    golden = json.loads((GOLDENS / "conditioning_zero_out.json").read_text())
    lyrics = torch.arange(1, 1 + len(golden["out"][0]["lyric_ids"][0]))[None]
    given = (
        ConditioningEntry(
            embedding=torch.ones(golden["in"][0]["shape"]),
            pooled=torch.ones(1, 4),
            lyric_ids=lyrics,
            lyrics_strength=0.4,
        ),
        ConditioningEntry(embedding=torch.ones(golden["in"][1]["shape"])),
    )

    full, bare = call("ConditioningZeroOut", conditioning=given)

    assert list(full.embedding.shape) == golden["out"][0]["shape"]
    assert not full.embedding.any()
    assert not full.pooled.any()
    assert full.lyric_ids.tolist() == golden["out"][0]["lyric_ids"]
    assert str(full.lyric_ids.dtype).endswith(golden["out"][0]["lyric_ids_dtype"])
    assert full.lyrics_strength == golden["out"][0]["lyrics_strength"]
    assert (bare.pooled, bare.lyric_ids) == (None, None)
    assert given[0].embedding.all()


def test_averaging_cuts_or_fills_the_other_to_the_length() -> None:
    longer = ConditioningEntry(embedding=torch.full((1, 3, 2), 4.0), pooled=torch.full((1, 2), 4.0))
    shorter = ConditioningEntry(embedding=torch.full((1, 2, 2), 8.0), pooled=torch.full((1, 2), 8.0))

    (mixed,) = call(
        "ConditioningAverage", conditioning_to=(longer,), conditioning_from=(shorter,), conditioning_to_strength=0.25
    )
    (cut,) = call(
        "ConditioningAverage", conditioning_to=(shorter,), conditioning_from=(longer,), conditioning_to_strength=0.25
    )

    assert mixed.embedding[0, :, 0].tolist() == [7.0, 7.0, 1.0]
    assert mixed.pooled[0, 0] == 7.0
    assert cut.embedding[0, :, 0].tolist() == [5.0, 5.0]


def test_combining_puts_one_after_the_other() -> None:
    one, two = (ConditioningEntry(embedding=torch.zeros(1, n, 1)) for n in (1, 2))

    assert call("ConditioningCombine", conditioning_1=(one,), conditioning_2=(two,)) == (one, two)


def test_a_part_of_a_batch_remembers_its_places_and_a_repeat_counts_on() -> None:
    batch = Latent(samples=torch.arange(4.0).reshape(4, 1, 1, 1), noise_mask=torch.ones(4, 1, 1))

    part = call("LatentFromBatch", samples=batch, batch_index=2, length=9)
    again = call("LatentFromBatch", samples=part, batch_index=1, length=1)
    repeated = call("RepeatLatentBatch", samples=part, amount=2)

    assert (part.samples.flatten().tolist(), part.batch_index, len(part.noise_mask)) == ([2.0, 3.0], (2, 3), 2)
    assert again.batch_index == (3,)
    assert repeated.samples.flatten().tolist() == [2.0, 3.0, 2.0, 3.0]
    assert repeated.batch_index == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [(128, 64, (8, 16)), (0, 64, (8, 16)), (128, 0, (8, 16)), (8, 8, (8, 8)), (0, 0, (4, 8))],
)
@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "bislerp"])
def test_latents_scale_in_pixels_and_never_below_64(width: int, height: int, shape: tuple, method: str) -> None:
    latent = Latent(samples=torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1)))

    scaled = call("LatentUpscale", samples=latent, upscale_method=method, width=width, height=height, crop="disabled")

    assert tuple(scaled.samples.shape) == (2, 4, *shape)
    assert scaled.samples.isfinite().all()


def test_a_film_latent_scales_frame_by_frame() -> None:
    film = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    scaled = scale(film, 16, 16, "bilinear", "disabled")

    alone = scale(film[:, :, 1], 16, 16, "bilinear", "disabled")
    assert torch.equal(scaled[:, :, 1], alone)


def test_mixing_on_the_sphere_keeps_the_length_between_equal_lengths() -> None:
    quarter = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two unit vectors at a right angle

    scaled = scale(quarter, 8, 1, "bislerp", "disabled")

    assert torch.allclose(scaled.norm(dim=1), torch.ones(1, 1, 8), atol=1e-5)


def test_pieces_of_a_film_are_joined_in_order() -> None:
    pieces = [torch.full((count, 2, 2, 3), float(value)) for value, count in enumerate((1, 4, 4))]

    film = join(iter(pieces), str)

    assert film[:, 0, 0, 0].tolist() == [0.0] + [1.0] * 4 + [2.0] * 4


def own_memory_bytes() -> int:
    """What this process alone has in memory: nothing of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_a_long_film_takes_a_pieces_memory_and_is_a_tensor_like_any_other(tmp_path: Path) -> None:
    folders = EngineWorld(tmp_path).folders
    peaks: list[int] = []

    def pieces(count: int):
        for value in range(count):
            peaks.append(own_memory_bytes())
            yield torch.full((1, 256, 256, 16), float(value))  # 4 MiB

    before = own_memory_bytes()
    film = join(pieces(60), folders.scratch_path, in_memory_bytes=16 << 20)

    assert max(peaks) - before < 80 << 20, "240 MiB went through"
    assert (film.shape, film.dtype) == ((60, 256, 256, 16), torch.float32)
    assert film[:, 7, 7, 7].tolist() == [float(value) for value in range(60)]
    assert torch.equal(film[40:42] + 1, film[41:43])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_long_film_is_changed_in_a_few_frames_memory(tmp_path: Path) -> None:
    frames = torch.arange(60.0).view(60, 1, 1, 1).expand(60, 512, 512, 3)  # 180 MiB if it were written out
    peaks: list[int] = []
    folders = EngineWorld(tmp_path).folders
    run = SimpleNamespace(folders=folders, check_stop=lambda: peaks.append(own_memory_bytes()))

    before = own_memory_bytes()
    (film,) = NODES["ImageInvert"].function(run, image=frames)

    assert len(peaks) == 12, "of 5 frames each"
    assert max(peaks) - before < 150 << 20
    assert film[:, 200, 100, 1].tolist() == [1.0 - value for value in range(60)]


def test_a_film_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    def pieces():
        yield torch.zeros(2, 8, 8, 3)
        raise Interrupted

    with pytest.raises(Interrupted):
        join(pieces(), EngineWorld(tmp_path).folders.scratch_path, in_memory_bytes=0)

    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_latent_is_kept_in_a_file_and_read_back(tmp_path: Path) -> None:
    world = EngineWorld(tmp_path)
    saved = world.run(
        {
            "1": node("EmptyLatentImage", width=64, height=64, batch_size=1),
            "2": node("SaveLatent", samples=["1", 0], filename_prefix="latents/x"),
        }
    )
    (shown,) = saved.outputs["2"]["latents"]
    assert shown == {"filename": "x_00001_.latent", "subfolder": "latents", "type": "output"}
    file = world.folders.paths.output / "latents" / shown["filename"]
    (world.folders.paths.input / "x.latent").write_bytes(file.read_bytes())

    (latent,) = NODES["LoadLatent"].function(_Run(world), latent="x.latent")

    assert tuple(latent.samples.shape) == (1, 4, 8, 8)


class _Run:
    def __init__(self, world: EngineWorld) -> None:
        self.folders = world.folders


def test_a_primitive_gives_its_value_in_its_type(tmp_path: Path) -> None:
    world = EngineWorld(tmp_path)
    graph = {
        "1": node("PrimitiveInt", value="64"),
        "2": node("PrimitiveString", value="from a primitive"),
        "3": node("EmptyImage", width=["1", 0], height=["1", 0], batch_size=1, color=0),
        "4": node("SaveImage", images=["3", 0], filename_prefix=["2", 0]),
    }

    outcome = world.run(graph)

    assert outcome.outputs["4"]["images"][0]["filename"] == "from a primitive_00001_.png"
    assert graph["1"]["inputs"]["value"] == 64
    for name, kind in (("Float", "FLOAT"), ("StringMultiline", "STRING"), ("Boolean", "BOOLEAN")):
        assert NODES[f"Primitive{name}"].declaration.outputs == (kind,)


def test_every_sampler_and_scheduler_of_comfyui_is_on_the_list() -> None:
    names = json.loads((GOLDENS / "names.json").read_text())
    inputs = NODES["KSampler"].declaration.inputs

    assert list(inputs["sampler_name"].options) == names["SAMPLERS"]
    assert sorted(inputs["scheduler"].options) == sorted(names["SCHEDULERS"])

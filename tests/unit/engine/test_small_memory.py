"""A device that holds one model at a time: two take turns on it, and every result is what it is with room for both.

Also: a part of one family in another one's place is told by node and input.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comfyfleet.engine.cache import ResultCache
from comfyfleet.engine.executor import Executor
from comfyfleet.engine.memory import Residency
from engine_goldens import GOLDENS, MODELS
from support.engine_world import EngineWorld, node

SD15 = json.loads((GOLDENS / "sd15" / "benchmark" / "graph.json").read_text())
WAN = json.loads((GOLDENS / "wan" / "t2v_16bit" / "graph.json").read_text())


class Watched(Residency):
    """Counts what moves off. Its device is a CPU, where networks leave when they are told to go."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__("cpu", budget_bytes)
        self.moved_off = 0

    def use(self, model) -> None:
        others = {id(other) for _, other in self._living()}
        super().use(model)
        for _, other in self._living():
            others.discard(id(other))
        self.moved_off += len(others)


@pytest.fixture
def world(tmp_path: Path) -> EngineWorld:
    (tmp_path / "models").symlink_to(MODELS)
    return EngineWorld(tmp_path)


def with_memory(world: EngineWorld, budget_bytes: int) -> Watched:
    memory = Watched(budget_bytes)
    world.executor = Executor(
        registry=world.registry,
        folders=world.folders,
        cache=ResultCache(1 << 30),
        residency=memory,
        clock=world.clock,
    )
    return memory


def seeded(graph: dict, seed: int) -> dict:
    return {
        name: {
            "class_type": each["class_type"],
            "inputs": {key: seed if key in ("seed", "noise_seed") else value for key, value in each["inputs"].items()},
        }
        for name, each in graph.items()
    }


def picture(world: EngineWorld, seed: int) -> np.ndarray:
    (shown,) = world.run(seeded(SD15, seed)).outputs["9"]["images"]
    return np.asarray(Image.open(world.folders.paths.output / shown["filename"]))


def film(world: EngineWorld, seed: int) -> bytes:
    outcome = world.run(seeded(WAN, seed))
    assert outcome.status == "success", outcome.failure
    (files,) = [ui["images"] for ui in outcome.outputs.values()]
    path = world.folders.paths.output / files[0]["subfolder"] / files[0]["filename"]
    return path.read_bytes()


def test_models_that_alternate_in_little_memory_give_what_they_give_in_much(world: EngineWorld) -> None:
    roomy = with_memory(world, 1 << 40)
    wanted = [(picture(world, seed), film(world, seed)) for seed in (1, 2)]
    assert roomy.moved_off == 0

    tight = with_memory(world, 800_000)  # less than any two of their parts
    found = [(picture(world, seed), film(world, seed)) for seed in (1, 2)]

    assert tight.moved_off >= 8
    for (one_picture, one_film), (other_picture, other_film) in zip(wanted, found, strict=True):
        assert np.array_equal(one_picture, other_picture)
        assert one_film == other_film


@pytest.mark.parametrize(
    ("graph", "node_id", "words"),
    [
        (
            {
                "1": node("CheckpointLoaderSimple", ckpt_name="golden_ace_step.safetensors"),
                "2": node("EmptyAceStepLatentAudio", seconds=1.0, batch_size=1),
                "3": node("VAEDecode", samples=["2", 0], vae=["1", 2]),
                "4": node("PreviewImage", images=["3", 0]),
            },
            "3",
            "vae is an autoencoder of sound: VAEDecodeAudio",
        ),
        (
            {
                "1": node("VAELoader", vae_name="golden_wan_vae.safetensors"),
                "2": node("EmptyAceStepLatentAudio", seconds=1.0, batch_size=1),
                "3": node("VAEDecodeAudio", samples=["2", 0], vae=["1", 0]),
                "4": node("PreviewAudio", audio=["3", 0]),
            },
            "3",
            "vae is an autoencoder of pictures",
        ),
        (
            {
                "1": node("CheckpointLoaderSimple", ckpt_name="golden_ace_step.safetensors"),
                "2": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
                "3": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
                "4": node("SaveLatent", samples=["3", 0], filename_prefix="x"),
            },
            "3",
            "vae is an autoencoder of sound: VAEEncodeAudio",
        ),
        (
            {
                "1": node("CheckpointLoaderSimple", ckpt_name="golden_sd15.safetensors"),
                "2": node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1),
                "3": node("VAEDecode", samples=["2", 0], vae=["1", 2]),
                "4": node("PreviewImage", images=["3", 0]),
            },
            "3",
            "this VAE decodes latents of shape (batch, 4, height, width)",
        ),
        (
            {
                "1": node("CheckpointLoaderSimple", ckpt_name="golden_ace_step.safetensors"),
                "2": node("LoraLoaderModelOnly", model=["1", 0], lora_name="golden_wan_lora_high.safetensors",
                          strength_model=1.0),
                "3": node("PreviewAny", source=["2", 0]),
            },
            "2",
            "this engine has no LoRA for ace_step models",
        ),
    ],
)  # fmt: skip
def test_a_part_of_another_family_is_named(world: EngineWorld, graph: dict, node_id: str, words: str) -> None:
    failure = world.run(graph).failure

    assert failure.node_id == node_id
    assert failure.exception_type.endswith("ModelFileUnusable")
    assert words in failure.exception_message

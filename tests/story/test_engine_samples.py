"""Sampling through the server: steps and previews are told, an interrupt takes one step, files are the golden ones."""

from __future__ import annotations

import copy
import io
import json
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from support.engine_process import RunningEngine, Talk, embedded_engine

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

GOLDENS = Path(__file__).parents[1] / "goldens"
GRAPH = json.loads((GOLDENS / "sd15" / "benchmark" / "graph.json").read_text())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with embedded_engine(tmp_path_factory.mktemp("sampler"), models=GOLDENS / "models") as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


def sampled(**changes: object) -> dict:
    graph = copy.deepcopy(GRAPH)
    graph["3"]["inputs"].update(changes)
    return graph


async def test_the_golden_picture_comes_out_and_its_steps_are_told(
    engine: RunningEngine, session: aiohttp.ClientSession
) -> None:
    client = await Talk(engine, session, "plain").listen()
    client.forget()

    entry = await client.run(sampled())

    ran = [message["data"]["node"] for message in client.messages if message["type"] == "executing"]
    assert ran == ["4", "5", "7", "6", "3", "8", "9", None]
    steps = [message["data"] for message in client.messages if message["type"] == "progress"]
    assert [(step["value"], step["max"], step["node"]) for step in steps] == [(n, 6, "3") for n in range(1, 7)]
    first = client.told().index("progress")
    assert client.told()[first - 1 : first + 2] == ["progress_state", "progress", "binary"]
    ended = [message["data"]["nodes"].get("3") for message in client.messages if message["type"] == "progress_state"][
        -1
    ]
    assert (ended["value"], ended["max"], ended["state"]) == (6, 6, "finished")
    (shown,) = entry["outputs"]["9"]["images"]
    picture = np.asarray(Image.open(engine.output / shown["filename"])).astype(int)
    golden = load_file(GOLDENS / "sd15" / "benchmark" / "record.safetensors")["image.uint8"][0].astype(int)
    assert np.abs(picture - golden).max() <= 1
    assert "miniature" not in entry["meta"]
    await client.socket.close()


async def test_a_preview_is_a_jpeg_of_512_pixels_with_metadata_for_those_who_ask(
    engine: RunningEngine, session: aiohttp.ClientSession
) -> None:
    plain = await Talk(engine, session, "plain").listen()
    modern = await Talk(engine, session, "modern").listen({"supports_preview_metadata": True})

    await plain.run(sampled(seed=1, steps=2))
    entry = await modern.run(sampled(seed=2, steps=2))

    assert len(plain.binaries) == len(modern.binaries) == 2
    assert struct.unpack(">II", plain.binaries[0][:8]) == (1, 1)
    image = Image.open(io.BytesIO(plain.binaries[0][8:]))
    assert (image.format, max(image.size)) == ("JPEG", 512)
    kind, length = struct.unpack(">II", modern.binaries[0][:8])
    assert kind == 4
    assert json.loads(modern.binaries[0][8 : 8 + length]) == {
        "node_id": "3", "prompt_id": entry["prompt"][1], "display_node_id": "3", "parent_node_id": None,
        "real_node_id": "3", "image_type": "image/jpeg",
    }  # fmt: skip
    assert Image.open(io.BytesIO(modern.binaries[0][8 + length :])).format == "JPEG"
    await plain.socket.close()
    await modern.socket.close()


async def test_an_interrupt_takes_effect_within_a_step_and_the_loaders_stay_known(
    engine: RunningEngine, session: aiohttp.ClientSession
) -> None:
    client = await Talk(engine, session, "hasty").listen()
    await client.run(sampled(seed=3, steps=1))
    _, answer = await client.submit(sampled(seed=4, steps=10_000))
    await client.until("progress", value=3)

    client.forget()
    await client.post("/interrupt", {"prompt_id": answer["prompt_id"]})
    told = await client.until("execution_interrupted")
    steps_after = client.told("progress")
    await client.finish(answer["prompt_id"])
    again = await client.run(sampled(seed=3, steps=1))

    assert (told["node_id"], told["node_type"]) == ("3", "KSampler")
    # Steps go on while the call travels, the more the busier the machine: it stopped long before its 10,000.
    assert len(steps_after) < 2_000
    assert again["status"]["messages"][1][1]["nodes"] == list(GRAPH)
    await client.socket.close()


async def test_a_missing_model_is_refused_with_the_nearest_name(
    engine: RunningEngine, session: aiohttp.ClientSession
) -> None:
    client = await Talk(engine, session, "typo").listen()
    graph = sampled()
    graph["4"]["inputs"]["ckpt_name"] = "golden-sd15.safetensors"

    status, answer = await client.submit(graph)

    assert status == 400
    (error,) = answer["node_errors"]["4"]["errors"]
    assert error["type"] == "value_not_in_list"
    assert error["extra_info"]["nearest"] == "golden_sd15.safetensors"
    await client.socket.close()


async def test_a_result_of_a_miniature_says_so(engine: RunningEngine, session: aiohttp.ClientSession) -> None:
    client = await Talk(engine, session, "small").listen()
    graph = sampled(steps=1)
    graph["4"]["inputs"]["ckpt_name"] = "v1-5-pruned-emaonly.safetensors"

    entry = await client.run(graph)

    assert entry["status"]["completed"]
    assert entry["meta"]["miniature"] is True
    await client.socket.close()


async def test_the_first_page_says_what_this_is_and_what_it_lacks(
    engine: RunningEngine, session: aiohttp.ClientSession
) -> None:
    async with session.get(engine.url) as response:
        page = await response.text()

    assert response.content_type == "text/html"
    for words in ("embedded engine", "What it lacks", "Custom nodes", "KSampler", "/object_info", "miniature"):
        assert words in page

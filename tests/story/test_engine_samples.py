"""Sampling through the server: steps and previews are told, an interrupt takes one step, files are the golden ones."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
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


CACHED = ("4", "5", "6", "7")  # what a second prompt of this kind finds known


def with_a_long_end(seed: int, blurs: int = 120) -> dict:
    """After sampling comes a minute and more of blurring, a second or so each: time to see what runs beside it."""
    graph = sampled(seed=seed)
    scaled = {"upscale_method": "bilinear", "width": 768, "height": 768, "crop": "disabled"}
    graph["20"] = {"class_type": "ImageScale", "inputs": {"image": ["8", 0], **scaled}}
    for number in range(blurs):
        graph[str(21 + number)] = {
            "class_type": "ImageBlur",
            "inputs": {"image": [str(20 + number), 0], "blur_radius": 14, "sigma": 1.0 + number / 100},
        }
    graph["9"]["inputs"]["images"] = [str(20 + blurs), 0]
    return graph


def pixels(engine: RunningEngine, entry: dict) -> np.ndarray:
    return np.asarray(Image.open(engine.output / entry["outputs"]["9"]["images"][0]["filename"]))


def of_prompt(client: Talk, prompt_id: str) -> list[tuple]:
    """What was told of one prompt: types, nodes and steps in order."""
    told = [message for message in client.messages if message.get("data", {}).get("prompt_id") == prompt_id]
    return [(message["type"], message["data"].get("node"), message["data"].get("value")) for message in told]


async def running(client: Talk) -> list[str]:
    return [item[1] for item in (await client.get("/queue"))[1]["queue_running"]]


async def test_the_next_prompts_sample_while_the_first_decodes_and_saves(
    engine: RunningEngine, session: aiohttp.ClientSession
) -> None:
    client = await Talk(engine, session, "overlap").listen()
    client.forget()
    graphs = [with_a_long_end(11), sampled(seed=12), sampled(seed=13)]
    first, second, third = [(await client.submit(graph))[1]["prompt_id"] for graph in graphs]

    await client.until("progress", prompt_id=second)
    beside = await running(client)
    entry = await client.finish(second)
    await client.finish(third)

    # The second was sampled, and the third after it, before the first had ended.
    assert beside[0] == first
    assert await running(client) == [first]
    assert not [message for message in of_prompt(client, first) if message[0] == "execution_success"]
    started = [message["data"]["prompt_id"] for message in client.messages if message["type"] == "execution_start"]
    assert started == [first, second, third]

    # An interrupt hits the prompt it names.
    await client.post("/interrupt", {"prompt_id": third})
    assert await running(client) == [first]
    await client.post("/interrupt", {"prompt_id": first})
    stopped = await client.finish(first)
    assert [kind for kind, _ in stopped["status"]["messages"]][-1] == "execution_interrupted"
    assert list((await client.get("/history"))[1])[-3:] == [second, third, first]

    # Alone, with nothing cached, the second tells the same in the same order and gives the same picture.
    await client.post("/free", {"free_memory": True})
    _, answer = await client.submit(sampled(seed=12))
    alone = await client.finish(answer["prompt_id"])
    lone, together = (
        [one for one in of_prompt(client, each) if one[0] != "progress_state" and one[1] not in CACHED]
        for each in (answer["prompt_id"], second)
    )
    assert lone == together
    assert ("progress", "3", 6) in lone
    assert np.array_equal(pixels(engine, alone), pixels(engine, entry))
    await client.socket.close()


async def test_a_killed_render_process_says_which_two_prompts_it_took_along(
    engine: RunningEngine, session: aiohttp.ClientSession
) -> None:
    client = await Talk(engine, session, "both").listen()
    _, decoding = await client.submit(with_a_long_end(14))
    _, sampling = await client.submit(sampled(seed=15, steps=10000))
    await client.until("progress", prompt_id=sampling["prompt_id"])

    os.kill(engine.render_process(), signal.SIGKILL)

    entries = [await client.entry(each["prompt_id"]) for each in (decoding, sampling)]
    for entry, other in zip(entries, (sampling, decoding), strict=True):
        kind, failure = entry["status"]["messages"][-1]
        assert (kind, failure["exception_type"]) == ("execution_error", "comfyfleet.RenderProcessLost")
        assert "SIGKILL" in failure["exception_message"]
        assert other["prompt_id"] in failure["exception_message"]
    await client.socket.close()

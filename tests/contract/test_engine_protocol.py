"""What a client of ComfyUI 0.3.64 may count on, asked of every engine we ship.

Which engines: `conftest.ENGINES`. Files and descriptions are in `test_engine_files.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import aiohttp
import pytest

from support.engine_process import RunningEngine, Talk, picture, slow_picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


# A run, told


async def test_a_first_run_is_told_in_comfyuis_order(client: Talk, colors: Iterator[int]) -> None:
    assert client.greeting["data"]["sid"] == "client-a"
    client.forget()

    entry = await client.run(picture(next(colors), "order"), extra_data={"extra_pnginfo": {"workflow": {"nodes": []}}})

    assert client.told() == [
        "status", "status", "execution_start", "execution_cached",
        "progress_state", "executing", "progress_state",
        "progress_state", "executing", "executed", "progress_state",
        "execution_success", "status", "executing",
    ]  # fmt: skip
    first, last = client.messages[4]["data"], client.messages[10]["data"]
    prompt_id = entry["prompt"][1]
    assert first["nodes"]["1"] == {
        "value": 0.0, "max": 1.0, "state": "running", "node_id": "1", "prompt_id": prompt_id,
        "display_node_id": "1", "parent_node_id": None, "real_node_id": "1",
    }  # fmt: skip
    assert {name: node["state"] for name, node in last["nodes"].items()} == {"1": "finished", "2": "finished"}
    assert client.messages[9]["data"] == {
        "node": "2",
        "display_node": "2",
        "output": {"images": [{"filename": "order_00001_.png", "subfolder": "", "type": "output"}]},
        "prompt_id": prompt_id,
    }


async def test_a_history_entry_has_comfyuis_shape(client: Talk, colors: Iterator[int]) -> None:
    entry = await client.run(picture(next(colors), "shape"), extra_data={"api_key_comfy_org": "secret", "mine": 1})

    number, prompt_id, prompt, extra_data, outputs = entry["prompt"]
    assert isinstance(number, int)
    assert prompt["1"]["class_type"] == "EmptyImage"
    assert extra_data == {"mine": 1, "client_id": "client-a"}
    assert outputs == ["2"]
    assert entry["outputs"] == {"2": {"images": [{"filename": "shape_00001_.png", "subfolder": "", "type": "output"}]}}
    assert entry["meta"] == {"2": {"node_id": "2", "display_node": "2", "parent_node": None, "real_node_id": "2"}}
    assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("success", True)
    assert [kind for kind, _ in entry["status"]["messages"]] == [
        "execution_start",
        "execution_cached",
        "execution_success",
    ]
    assert all(data["prompt_id"] == prompt_id and data["timestamp"] > 1e12 for _, data in entry["status"]["messages"])


async def test_a_repeat_is_answered_from_the_cache_with_the_old_file(client: Talk, colors: Iterator[int]) -> None:
    prompt = picture(next(colors), "repeat")
    first = await client.run(prompt)
    client.forget()

    second = await client.run(prompt)

    assert client.told() == [
        "status", "status", "execution_start", "execution_cached", "executed", "progress_state",
        "execution_success", "status", "executing",
    ]  # fmt: skip
    assert client.messages[3]["data"]["nodes"] == ["1", "2"]
    assert client.messages[5]["data"]["nodes"]["2"]["value"] == 1
    assert second["outputs"] == first["outputs"]


async def test_a_failure_is_told_and_remembered_and_the_good_branch_keeps_its_file(
    client: Talk, colors: Iterator[int]
) -> None:
    (client.engine.input / "bad.png").write_bytes(b"no picture")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "bad.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "bad"}},
        **{name + "0": node for name, node in picture(next(colors), "good").items()},
    }
    graph["20"]["inputs"]["images"] = ["10", 0]
    client.forget()

    entry = await client.run(graph)

    assert client.told()[-3:] == ["execution_error", "status", "executing"]
    error = client.messages[-3]["data"]
    assert (error["node_id"], error["node_type"]) == ("1", "LoadImage")
    assert error["exception_type"] == "PIL.UnidentifiedImageError"
    assert error["exception_message"].endswith("\n")
    assert error["current_inputs"] == {"image": ["bad.png"]}
    assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("error", False)
    assert entry["status"]["messages"][-1][0] == "execution_error"
    assert "1" not in entry["outputs"]


# Who hears what


async def test_another_client_hears_only_the_queue(
    engine: RunningEngine, session: aiohttp.ClientSession, colors: Iterator[int]
) -> None:
    mine, other = await Talk(engine, session, "mine").listen(), await Talk(engine, session, "other").listen()
    mine.forget(), other.forget()

    await mine.run(picture(next(colors)))
    await other.until("status", status={"exec_info": {"queue_remaining": 0}})

    assert set(other.told()) == {"status"}
    await mine.socket.close(), await other.socket.close()


async def test_a_prompt_of_nobody_is_told_to_everyone_but_only_in_part(client: Talk, colors: Iterator[int]) -> None:
    client.forget()

    status, answer = await client.post("/prompt", {"prompt": picture(next(colors))})
    await client.until("status", status={"exec_info": {"queue_remaining": 0}})

    assert status == 200
    assert client.told("progress_state") == ["progress_state"] * 4
    assert set(client.told()) == {"status", "progress_state"}
    assert (await client.entry(answer["prompt_id"]))["prompt"][3] == {}


async def test_a_reconnect_is_told_the_node_that_runs_and_then_the_rest(
    engine: RunningEngine, session: aiohttp.ClientSession, colors: Iterator[int]
) -> None:
    first = await Talk(engine, session, "again").listen()
    _, answer = await first.submit(slow_picture(next(colors)))
    await first.until("executing", node="10")
    await first.socket.close()

    second = await Talk(engine, session, "again").listen()
    entry = await second.finish(answer["prompt_id"])

    assert second.messages[0]["data"]["sid"] == "again"
    resumed = second.messages[1]
    assert resumed["type"] == "executing"
    assert set(resumed["data"]) == {"node"}
    assert entry["status"]["completed"]
    await second.socket.close()


async def test_features_are_agreed_once_and_by_the_first_object_that_parses(
    engine: RunningEngine, session: aiohttp.ClientSession, colors: Iterator[int]
) -> None:
    talk = Talk(engine, session, "features")
    talk.socket = await session.ws_connect(f"{engine.url}/ws?clientId=features")
    for no_object in ("hello, not JSON", "[]", "5"):
        await talk.socket.send_str(no_object)
    await talk.socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
    await talk.socket.send_json({"type": "feature_flags", "data": {}})

    await talk.until("feature_flags")
    entry = await talk.run(picture(next(colors)))

    assert talk.messages[1]["data"] == {"supports_preview_metadata": True, "max_upload_size": 104857600}
    assert talk.told("feature_flags") == ["feature_flags"]
    assert entry["status"]["completed"]
    await talk.socket.close()


async def test_comfyuis_own_websocket_example_works_unchanged(
    engine: RunningEngine, session: aiohttp.ClientSession, colors: Iterator[int]
) -> None:
    async with session.ws_connect(f"{engine.url}/ws?clientId=example") as socket:
        body = json.dumps({"prompt": picture(next(colors), "example"), "client_id": "example"}).encode()
        async with session.post(f"{engine.url}/prompt", data=body) as response:
            prompt_id = (await response.json(content_type=None))["prompt_id"]
        async for received in socket:
            if received.type != aiohttp.WSMsgType.TEXT:
                continue
            message = json.loads(received.data)
            if message["type"] == "executing" and message["data"]["node"] is None:
                assert message["data"]["prompt_id"] == prompt_id
                break
    async with session.get(f"{engine.url}/history/{prompt_id}") as response:
        history = (await response.json())[prompt_id]
    for image in history["outputs"]["2"]["images"]:
        async with session.get(f"{engine.url}/view", params={**image, "type": image["type"]}) as response:
            assert (await response.read()).startswith(b"\x89PNG")


# The queue


async def test_lower_numbers_run_first_and_front_goes_before(client: Talk, colors: Iterator[int]) -> None:
    _, running = await client.submit(slow_picture(next(colors)))
    await client.until("executing", node="10")
    answers = {}
    for name, fields in {
        "plain": {},
        "front": {"front": True},
        "number": {"number": -0.5},
        "own": {"prompt_id": "my-own-id"},
    }.items():
        _, answers[name] = await client.submit(picture(next(colors)), **fields)
    _, listed = await client.get("/queue")
    client.forget()

    await client.finish("my-own-id")

    assert answers["front"]["number"] < 0
    assert answers["number"]["number"] == -0.5
    assert listed["queue_running"][0][1] == running["prompt_id"]
    assert len(listed["queue_pending"]) == 4
    assert all(len(item) == 5 for item in listed["queue_pending"])
    started = [message["data"]["prompt_id"] for message in client.messages if message["type"] == "execution_start"]
    assert started == [answers[name]["prompt_id"] for name in ("front", "number", "plain", "own")]


async def test_a_deleted_prompt_leaves_no_trace_and_a_running_one_stays(client: Talk, colors: Iterator[int]) -> None:
    _, running = await client.submit(slow_picture(next(colors)))
    await client.until("executing", node="10")
    _, waiting = await client.submit(picture(next(colors)))

    status, body = await client.post("/queue", {"delete": [waiting["prompt_id"], running["prompt_id"], "unknown"]})
    entry = await client.finish(running["prompt_id"])

    assert (status, body) == (200, "")
    assert entry["status"]["completed"]
    assert (await client.get(f"/history/{waiting['prompt_id']}"))[1] == {}


async def test_an_interrupt_stops_only_the_prompt_it_names(client: Talk, colors: Iterator[int]) -> None:
    _, running = await client.submit(slow_picture(next(colors)))
    await client.until("executing", node="10")

    assert await client.post("/interrupt", {"prompt_id": "another"}) == (200, "")
    await client.until("executing", node="12")
    assert await client.post("/interrupt", {"prompt_id": running["prompt_id"]}) == (200, "")
    told = await client.until("execution_interrupted")
    entry = await client.finish(running["prompt_id"])

    assert told["node_type"] == "ImageScale"
    assert "1" in told["executed"]
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"


async def test_an_interrupt_that_names_no_prompt_stops_what_runs_and_the_next_one_is_not_hit(
    client: Talk, colors: Iterator[int]
) -> None:
    assert await client.post("/interrupt") == (200, "")
    assert (await client.run(picture(next(colors))))["status"]["completed"]

    _, running = await client.submit(slow_picture(next(colors)))
    await client.until("executing", node="10")
    assert await client.post("/interrupt", b"{ cannot be read") == (200, "")
    assert (await client.finish(running["prompt_id"]))["status"]["status_str"] == "error"

    assert (await client.run(picture(next(colors))))["status"]["completed"]


async def test_history_is_paged_deleted_and_cleared(client: Talk, colors: Iterator[int]) -> None:
    ids = [(await client.run(picture(next(colors))))["prompt"][1] for _ in range(3)]

    assert list((await client.get("/history?max_items=2"))[1]) == ids[1:]
    await client.post("/history", {"delete": [ids[1], "unknown"]})
    assert (await client.get(f"/history/{ids[1]}"))[1] == {}
    assert (await client.get("/history/unknown"))[1] == {}
    assert await client.post("/history", {"clear": True}) == (200, "")
    assert (await client.get("/history"))[1] == {}


async def test_free_makes_the_next_identical_prompt_run_again(client: Talk, colors: Iterator[int]) -> None:
    prompt = picture(next(colors), "freed")
    await client.run(prompt)

    assert await client.post("/free", {"unload_models": True, "free_memory": True}) == (200, "")
    entry = await client.run(prompt)

    assert entry["outputs"]["2"]["images"][0]["filename"] == "freed_00002_.png"

"""Whatever comes, the engine lives: a killed render costs one job, a poisonous body a 400, a slow reader nobody."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import anyio
import pytest

from support.engine_process import WAIT_S, RunningEngine, Talk, embedded_engine, picture, slow_picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with embedded_engine(tmp_path_factory.mktemp("survivor")) as running:
        yield running


@pytest.fixture
async def client(engine: RunningEngine) -> AsyncIterator[Talk]:
    async with aiohttp.ClientSession() as session:
        talk = await Talk(engine, session, "survivor").listen()
        yield talk
        await talk.socket.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_gone(pid: int) -> None:
    with anyio.fail_after(WAIT_S):
        while is_running(pid):  # noqa: ASYNC110 - another process ends; it has no event of ours
            await anyio.sleep(0.02)


async def test_a_killed_render_process_costs_one_job_which_is_told_why(client: Talk) -> None:
    _, doomed = await client.submit(slow_picture(1))
    _, waiting = await client.submit(picture(2, "after"))
    await client.until("executing", node="10")

    os.kill(client.engine.render_process(), signal.SIGKILL)
    error = await client.until("execution_error", prompt_id=doomed["prompt_id"])
    lost = await client.finish(doomed["prompt_id"])
    next_one = await client.finish(waiting["prompt_id"])

    assert error["exception_type"] == "comfyfleet.RenderProcessLost"
    assert "SIGKILL" in error["exception_message"]
    assert error["node_type"] == "ImageScale"
    assert lost["status"]["status_str"] == "error"
    assert next_one["status"]["completed"]


async def test_a_render_process_that_dies_while_idle_costs_nothing(client: Talk) -> None:
    await client.run(picture(3))

    pid = client.engine.render_process()
    os.kill(pid, signal.SIGKILL)

    assert (await client.run(picture(4)))["status"]["completed"]


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


GOOD = picture(5)
KILLERS: dict[str, dict] = {
    "extra_data is null": {"prompt": GOOD, "extra_data": None},
    "extra_data is a number": {"prompt": GOOD, "extra_data": 5},
    "extra_data is a list": {"prompt": GOOD, "extra_data": []},
    "extra_data is text": {"prompt": GOOD, "extra_data": "x"},
    "extra_pnginfo is text": {"prompt": GOOD, "extra_data": {"extra_pnginfo": "x"}},
    "a node without inputs": {"prompt": GOOD | {"3": {"class_type": "EmptyImage"}}},
    "inputs are null": {"prompt": GOOD | {"3": {"class_type": "EmptyImage", "inputs": None}}},
    "inputs are text": {"prompt": GOOD | {"3": {"class_type": "EmptyImage", "inputs": "x"}}},
    "a deep input": {"prompt": picture(6, bogus=nested(900))},
    "a deep note": {"prompt": GOOD | {"3": {"class_type": "EmptyImage", "inputs": {}, "_meta": nested(900)}}},
    "a deep input nobody needs": {"prompt": GOOD | {"3": {"class_type": "EmptyImage", "inputs": {"x": nested(900)}}}},
    "client_id is an object": {"prompt": GOOD, "client_id": {}},
    "client_id is a list": {"prompt": GOOD, "client_id": []},
    "extra_data.client_id is a list": {"prompt": GOOD, "extra_data": {"client_id": []}},
    "number is not finite": {"prompt": GOOD, "number": "nan"},
    "number is no number": {"prompt": GOOD, "number": "abc"},
    "prompt_id is an object": {"prompt": GOOD, "prompt_id": {"a": 1}},
    "prompt is null": {"prompt": None},
    "prompt is text": {"prompt": "x"},
    "prompt is a list": {"prompt": []},
    "a node is null": {"prompt": {"1": None}},
    "class_type cannot be hashed": {"prompt": {"1": {"class_type": {}, "inputs": {}}}},
    "a cycle": {
        "prompt": {
            "1": {"class_type": "ImageScale", "inputs": {"image": ["2", 0]}},
            "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0]}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
        }
    },
}
NO_JSON = [b"", b'{"prompt": {', b"[]", b"null", b'"text"', b'{"number": NaN}', b"[" * 5000, b"\xff\xfe"]


async def test_what_kills_a_comfyui_gets_a_400_and_the_engine_lives(client: Talk) -> None:
    pid = client.engine.render_process()
    for what, body in KILLERS.items():
        status, answer = await client.post("/prompt", body)
        assert status == 400, what
        assert answer["error"]["type"], what
        assert answer["error"]["message"], what
    for body in NO_JSON:
        status, answer = await client.post("/prompt", body)
        assert (status, set(answer)) == (400, {"error", "node_errors"}), body

    assert (await client.run(picture(7)))["status"]["completed"]
    assert client.engine.render_process() == pid
    assert client.engine.process.poll() is None


async def test_a_body_over_the_limit_is_refused_before_it_is_read(client: Talk) -> None:
    async with await anyio.connect_tcp("127.0.0.1", client.engine.port) as stream:
        await stream.send(f"POST /prompt HTTP/1.1\r\nHost: x\r\nContent-Length: {101 << 20}\r\n\r\n".encode())
        answer = await stream.receive()
        while b"exceeded" not in answer:
            answer += await stream.receive()

    assert answer.startswith(b"HTTP/1.1 413")
    assert answer.endswith(b"Maximum request body size 104857600 exceeded.")


async def test_a_value_nested_as_deep_as_comfyui_bears_it_runs(client: Talk) -> None:
    entry = await client.run(picture(11, bogus=nested(400)))

    assert entry["status"]["completed"]


async def test_integers_of_any_size_survive(client: Talk) -> None:
    entry = await client.run(picture(8, huge=2**80))

    assert entry["prompt"][2]["1"]["inputs"]["huge"] == 2**80


async def test_a_client_that_does_not_read_delays_nobody(client: Talk) -> None:
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", client.engine.port))
        key = base64.b64encode(b"0123456789abcdef").decode()
        deaf.sendall(
            f"GET /ws?clientId=deaf HTTP/1.1\r\nHost: 127.0.0.1:{client.engine.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        graph = picture(9)
        for step in range(200):
            graph[f"s{step}"] = {
                "class_type": "ImageScale",
                "inputs": {
                    "image": [f"s{step - 1}" if step else "1", 0],
                    "upscale_method": "area",
                    "width": 8,
                    "height": 8 + step % 2,
                    "crop": "disabled",
                },
            }
        graph["2"]["inputs"]["images"] = ["s199", 0]

        # Without a client id everyone is told, the deaf one too: some tens of megabytes.
        _, broadcast = await client.post("/prompt", {"prompt": graph})
        entry = await client.run(picture(10))

        assert entry["status"]["completed"]
        assert (await client.entry(broadcast["prompt_id"]))["status"]["completed"]


async def test_a_killed_server_leaves_no_render_process(tmp_path: Path) -> None:
    with embedded_engine(tmp_path) as engine:
        async with aiohttp.ClientSession() as session:
            client = await Talk(engine, session, "a").listen()
            await client.submit(slow_picture(1))
            await client.until("executing", node="10")
            child = engine.render_process()

            engine.process.kill()
            engine.process.wait()

        await until_gone(child)


async def test_a_stopped_server_leaves_no_process_and_no_half_written_file(tmp_path: Path) -> None:
    with embedded_engine(tmp_path) as engine:
        async with aiohttp.ClientSession() as session:
            client = await Talk(engine, session, "a").listen()
            film = {
                "1": {
                    "class_type": "EmptyImage",
                    "inputs": {"width": 640, "height": 640, "batch_size": 200, "color": 1},
                },
                "2": {
                    "class_type": "SaveWEBM",
                    "inputs": {"images": ["1", 0], "filename_prefix": "film", "codec": "vp9", "fps": 16, "crf": 30},
                },
            }
            await client.submit(film)
            await client.until("executing", node="2")
            child = engine.render_process()
    await until_gone(child)

    assert not list((tmp_path / "output").glob("*.webm"))


def test_an_engine_that_cannot_start_ends_and_its_last_line_says_why(tmp_path: Path) -> None:
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("models", "miniatures", "input", "output", "temp")]

    ended = subprocess.run(
        [sys.executable, "-m", "comfyfleet", "engine", "--port", "0", "--device", "cuda:0", *folders],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("cuda:0 cannot be used by torch ")

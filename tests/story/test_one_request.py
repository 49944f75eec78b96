"""One request, all the way through: a fresh machine, our client and the real one, good input and bad."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest

from comfyfleet import Serverless
from support.machine import Machine, a_machine, document_payload, small_film, small_song
from support.vastai import run_vastai

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SAMPLES = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory):
    with a_machine(tmp_path_factory.mktemp("machine") / "data") as machine:
        machine.wait_ready()
        yield machine


async def ask(machine: Machine, payload: dict[str, Any], **options: Any) -> Any:
    async with Serverless(machine.key, url=machine.url) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        return await endpoint.request("/generate/sync", payload, **options)


def key_paths(value: Any, path: str = "") -> dict[str, str]:
    """Every key path with its JSON type. Under an id that is random, and inside lists, names are made general."""
    if isinstance(value, dict):
        found = {}
        for key, inner in value.items():
            name = "<prompt>" if len(key) == 36 and key.count("-") == 4 else key
            found.update(key_paths(inner, f"{path}.{name}"))
        return found or {path: "object"}
    if isinstance(value, list):
        found = {path: "array"}
        for inner in value:
            found.update(key_paths(inner, f"{path}[]"))
        return found
    kinds = {bool: "boolean", str: "string", int: "number", float: "number", type(None): "null"}
    return {path: kinds[type(value)]}


@pytest.mark.parametrize(
    ("sample", "graph"),
    [("ace_step_v1_t2m.response.json", small_song()), ("wan22_t2v_a14b.response.json", small_film())],
)
async def test_an_answer_has_every_key_and_type_of_the_documents_sample(
    machine: Machine, sample: str, graph: dict[str, Any]
) -> None:
    await ask(machine, document_payload(graph))  # the samples come from a warm engine: they list cached nodes
    outcome = await ask(machine, document_payload(graph))

    assert outcome["ok"], outcome["text"]
    wanted = key_paths(json.loads((SAMPLES / sample).read_text(encoding="utf-8")))
    given = key_paths(outcome["response"])
    # The sample's prompt holds three of the graph's nodes; ours holds all of them, these three included.
    missing = {path: kind for path, kind in wanted.items() if given.get(path) != kind and not path.endswith(".seed")}
    missing.pop(".timings", None)  # empty there, filled here
    assert missing == {}
    assert outcome["response"]["miniature"] is True


async def test_the_url_in_an_answer_gives_the_files_bytes_and_a_changed_one_does_not(machine: Machine) -> None:
    outcome = await ask(machine, document_payload(small_song()))
    entry = outcome["response"]["output"][0]

    async with aiohttp.ClientSession() as session:
        async with session.get(entry["url"]) as answer:
            assert answer.status == 200
            assert await answer.read() == Path(entry["local_path"]).read_bytes()
        async with session.get(entry["url"].replace("signature=", "signature=0")) as answer:
            assert answer.status == 403


async def test_the_unmodified_vastai_client_completes_the_same_requests(machine: Machine) -> None:
    answers = run_vastai(
        """
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            endpoint = await client.get_endpoint(name="comfyui-json")
            RESULT = [await endpoint.request("/generate/sync", payload) for payload in PAYLOADS]
        """,
        base=machine.url,
        key=machine.key,
        timeout_s=240,
        PAYLOADS=[document_payload(small_song()), document_payload(small_film())],
    )

    assert [answer["ok"] for answer in answers] == [True, True]
    assert [answer["response"]["output"][0]["output_type"] for answer in answers] == ["audio", "images"]
    assert [answer["response"]["status"] for answer in answers] == ["completed", "completed"]


def broken(node: str, **inputs: Any) -> dict[str, Any]:
    graph = small_song()
    graph[node]["inputs"].update(inputs)
    return graph


def without(node: str, name: str) -> dict[str, Any]:
    graph = small_song()
    del graph[node]["inputs"][name]
    return graph


def with_class(node: str, class_type: str) -> dict[str, Any]:
    graph = small_song()
    graph[node]["class_type"] = class_type
    return graph


@pytest.mark.parametrize(
    ("graph", "node", "words"),
    [
        (with_class("52", "KSamplr"), "52", ["KSamplr"]),
        (without("52", "cfg"), "52", ["cfg"]),
        (broken("52", model=["14", 0]), "52", ["model"]),
        (broken("44", conditioning=["44", 0]), "44", ["44"]),
        (broken("52", steps=0), "52", ["steps"]),
        (broken("52", sampler_name="eulr"), "52", ["sampler_name"]),
        (broken("40", ckpt_name="ace_step_v1_3.5.safetensors"), "40", ["ckpt_name", "ace_step_v1_3.5b.safetensors"]),
    ],
    ids=["unknown class", "missing input", "wrong link type", "cycle", "out of range", "not in list", "missing file"],
)
async def test_a_broken_graph_is_a_4xx_that_names_the_node_and_the_input(
    machine: Machine, graph: dict[str, Any], node: str, words: list[str]
) -> None:
    outcome = await ask(machine, document_payload(graph))

    body = outcome["response"]
    assert outcome["status"] == 422
    assert body["status"] == "failed"
    assert str(body["error"]["details"]["node_id"]) == node
    for word in words:
        assert word in json.dumps(body)
    assert body["output"] == []


@pytest.mark.parametrize(
    ("payload", "status", "field"),
    [
        ({"input": {}}, 422, "workflow_json"),
        ({"input": {"workflow_json": [1, 2]}}, 400, "workflow_json"),
        ({"input": {"workflow_json": "{}"}}, 400, "workflow_json"),
        ({"input": {"workflow_json": small_song(), "request_id": "../../escape"}}, 400, "request_id"),
        ({}, 400, "input"),
    ],
)
async def test_a_wrong_body_is_a_4xx_that_names_the_field(
    machine: Machine, payload: dict[str, Any], status: int, field: str
) -> None:
    outcome = await ask(machine, payload)

    assert outcome["status"] in (400, 422)
    assert field in json.dumps(outcome["response"])


async def test_the_public_port_answers_401_without_a_good_ticket(machine: Machine) -> None:
    outcome = await ask(machine, document_payload(small_song()))
    used = outcome["auth_data"]

    async with aiohttp.ClientSession() as session:
        for auth_data in (None, used, {**used, "ticket": used["ticket"][:-4] + "AAAA"}, {**used, "ticket": ""}):
            call = {"auth_data": auth_data, "payload": document_payload(small_song()), "session_id": None}
            async with session.post(f"{outcome['url']}/generate/sync", json=call) as answer:
                body = await answer.json()
                assert answer.status == 401
                assert body["error"]["details"]["reason"]


async def test_malformed_json_and_a_body_over_the_limit_are_told_apart(machine: Machine) -> None:
    worker = (await ask(machine, document_payload(small_song())))["url"]

    async with aiohttp.ClientSession() as session:
        async with session.post(f"{worker}/generate/sync", data=b'{"half') as answer:
            assert answer.status in (400, 422)
            assert (await answer.json())["status"] == "failed"
        async with session.post(f"{worker}/generate/sync", data=io.BytesIO(b" " * (65 * 2**20))) as answer:
            assert answer.status == 413


async def test_an_unreachable_s3_does_not_lose_the_song(machine: Machine) -> None:
    s3 = {
        "access_key_id": "a",
        "secret_access_key": "very-secret-value",
        "endpoint_url": "http://s3.does-not-resolve.example:9",
        "bucket_name": "b",
        "region": "r",
        "connect_timeout": 1,
        "connect_attempts": 1,
    }
    outcome = await ask(machine, document_payload(small_song(), s3=s3))

    assert outcome["response"]["status"] == "completed"
    assert outcome["response"]["output"][0]["upload_error"]
    assert "very-secret-value" not in json.dumps(outcome["response"])


async def test_the_router_knows_what_the_worker_has_in_memory_and_what_such_a_workflow_costs(machine: Machine) -> None:
    song = small_song()
    (checkpoint,) = {
        value for node in song.values() for value in node["inputs"].values() if str(value).endswith(".safetensors")
    }
    for seed in range(4):  # one that loads the model, and three that show what it costs without
        song = {
            node_id: {**node, "inputs": {**node["inputs"], **({"seed": seed} if "seed" in node["inputs"] else {})}}
            for node_id, node in song.items()
        }
        assert (await ask(machine, document_payload(song)))["ok"]

    async def warm(client: Serverless) -> bool:
        return checkpoint in (await client.get("/v1/workers"))["workers"][0]["warm_models"]

    async def known(client: Serverless) -> bool:
        endpoint = await client.get_endpoint(name="comfyui-json")
        outcome = await endpoint.request("/generate/sync", document_payload(song), cost=12_345.0)
        return 0 < outcome["auth_data"]["cost"] < 12_345.0

    async with Serverless(machine.key, url=machine.url) as client:
        await soon(warm, client)
        await soon(known, client)  # what was learned stands over the caller's guess, and the ticket says it


async def soon(is_so: Callable[[Serverless], Awaitable[bool]], client: Serverless) -> None:
    with anyio.fail_after(60, reason=f"{is_so.__name__} never came true"):
        while not await is_so(client):  # noqa: ASYNC110 - nothing tells when a worker's next report has come
            await anyio.sleep(0.2)


async def test_a_second_up_says_that_one_runs_and_where(machine: Machine) -> None:
    second = Machine(machine.data_dir)

    second.wait_for("already running")
    assert machine.url in second.lines[-1]
    assert second.process.wait(timeout=120) != 0
    second.stop()

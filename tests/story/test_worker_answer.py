"""The documents' two requests, every field of their payload, get the documents' answers: every key and type of theirs.

Over the fake engine, so the media are short samples; what is in them is the engine's and the demo's business.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comfyfleet import cli
from comfyfleet.testing.processes import a_worker

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(280)]

SAMPLES = Path(__file__).parent.parent / "data"
REQUESTS = Path(cli.__file__).parent / "requests"
NAMES = ("ace_step_v1_t2m", "wan22_t2v_a14b")


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def worker(tmp_path_factory):
    async with a_worker(tmp_path_factory.mktemp("worker")) as running:
        yield running


def payload_of(name):
    empty = dict.fromkeys(("access_key_id", "secret_access_key", "endpoint_url", "bucket_name", "region"), "")
    return {
        "input": {
            "request_id": "",
            "workflow_json": json.loads((REQUESTS / f"{name}.json").read_text()),
            "s3": empty,
            "webhook": {"url": "", "extra_params": {"user_id": "12345", "project_id": "abc-def"}},
        }
    }


def shape(value):
    """The value's type, as JSON knows it."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return type(value).__name__


def missing(sample, answer, path=""):
    """Key paths of `sample` that `answer` lacks or has with another type."""
    if shape(sample) != shape(answer):
        return [f"{path}: {shape(sample)} expected, {shape(answer)} found"]
    if isinstance(sample, dict):
        return [
            problem
            for key, value in sample.items()
            for problem in (
                missing(value, answer[key], f"{path}.{key}") if key in answer else [f"{path}.{key} is missing"]
            )
        ]
    if isinstance(sample, list) and sample and isinstance(sample[0], dict):
        return missing(sample[0], answer[0], f"{path}[0]") if answer else [f"{path} is empty"]
    return []


def with_prompt_id(response, prompt_id):
    """The sample, its prompt id replaced by ours, without its graph (the documents shorten it)."""
    text = json.dumps(response)
    theirs = response["comfyui_response"]["execution_details"]["prompt_id"]
    sample = json.loads(text.replace(theirs, prompt_id))
    sample["comfyui_response"][prompt_id]["prompt"][2] = {}
    return sample


@pytest.mark.parametrize("name", NAMES)
async def test_every_key_of_the_documents_answer_is_in_ours_with_its_type(worker, name):
    status, answer = await worker.post("/generate/sync", payload_of(name))

    assert status == 200
    prompt_id = answer["comfyui_response"]["execution_details"]["prompt_id"]
    sample = with_prompt_id(json.loads((SAMPLES / f"{name}.response.json").read_text()), prompt_id)
    assert missing(sample, answer) == []
    assert list(answer)[:6] == list(sample)

    entry = answer["comfyui_response"][prompt_id]
    kinds = [message[0] for message in entry["status"]["messages"]]
    assert kinds == ["execution_start", "execution_cached", "execution_success"]
    (output,) = answer["output"]
    theirs = sample["output"][0]
    assert (output["subfolder"], output["output_type"], output["node_id"]) == (
        theirs["subfolder"],
        theirs["output_type"],
        theirs["node_id"],
    )
    assert Path(output["local_path"]).parts[-3:] == (answer["id"], output["subfolder"], output["filename"])
    assert answer["message"] == sample["message"]


@pytest.mark.parametrize("name", NAMES)
async def test_the_answers_link_gives_the_file_and_a_changed_link_does_not(worker, name):
    _, answer = await worker.post("/generate/sync", payload_of(name))
    (output,) = answer["output"]

    async with worker.session.get(output["url"]) as found:
        assert found.status == 200
        assert len(await found.read()) == output["size_bytes"]
    async with worker.session.get(output["url"][:-1] + ("0" if output["url"][-1] != "0" else "1")) as refused:
        assert refused.status == 403


async def test_seeds_are_rolled_and_the_rest_of_the_graph_is_untouched(worker):
    payload = payload_of("ace_step_v1_t2m")
    _, answer = await worker.post("/generate/sync", payload)

    sent = payload["input"]["workflow_json"]
    prompt_id = answer["comfyui_response"]["execution_details"]["prompt_id"]
    prompt = answer["comfyui_response"][prompt_id]["prompt"][2]
    assert isinstance(prompt["52"]["inputs"].pop("seed"), int)
    assert sent["52"]["inputs"].pop("seed") == "__RANDOM_INT__"
    assert prompt == sent


async def test_comfyuis_own_words_can_be_left_out(worker):
    headers = {"X-Include-ComfyUI-Response": "0"}
    async with worker.session.post(
        f"{worker.base_url}/generate/sync", json=payload_of("ace_step_v1_t2m"), headers=headers
    ) as answered:
        answer = await answered.json()

    assert answer["comfyui_response"] == {}
    assert answer["output"][0]["url"]


async def test_a_result_read_later_has_a_fresh_link(worker):
    _, answer = await worker.post("/generate/sync", {**payload_of("ace_step_v1_t2m")})

    _, later = await worker.get(f"/result/{answer['id']}")

    async with worker.session.get(later["output"][0]["url"]) as found:
        assert found.status == 200
    assert later["output"][0]["sha256"] == answer["output"][0]["sha256"]

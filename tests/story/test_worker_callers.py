"""What callers may do: cancel, hang up, come back, wait only so long, follow along. And what they get."""

from __future__ import annotations

import json

import anyio
import pytest

from comfyfleet.testing.processes import a_worker, picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def worker(tmp_path_factory):
    async with a_worker(tmp_path_factory.mktemp("worker"), MAX_QUEUE_SIZE="6") as running:
        yield running


async def accepted(worker, graph, **fields):
    status, answer = await worker.generate(graph, path="/generate", **fields)
    assert status == 202
    return answer["id"]


async def until(worker, job_id, status):
    """Follow the job's own events up to a status."""
    headers = {"Accept": "text/event-stream"}
    async with worker.session.get(f"{worker.base_url}/result/{job_id}", headers=headers) as answer:
        async for line in answer.content:
            if f'"status":"{status}"'.encode() in line:
                return


async def test_cancelling_a_queued_job_stops_exactly_that_one(worker):
    running = await accepted(worker, picture(1, gate="queued"))
    first, second, third = [await accepted(worker, picture(2 + n)) for n in range(3)]

    status, answer = await worker.post(f"/cancel/{second}", {})

    assert (status, answer["cancelled"]) == (200, True)
    assert (await worker.result(second))[0] == 499  # while the job before it still holds the engine
    worker.open_gate("queued")
    assert [(await worker.result(job))[0] for job in (running, first, third)] == [200] * 3


async def test_cancelling_a_running_job_frees_the_engine_for_the_next(worker):
    running = await accepted(worker, picture(10, gate="never"))
    waiting = await accepted(worker, picture(11))
    await until(worker, running, "generating")

    await worker.post(f"/cancel/{running}", {})

    status, answer = await worker.result(running)
    assert (status, answer["status"]) == (499, "cancelled")
    assert (await worker.result(waiting))[0] == 200


async def test_cancelling_a_finished_job_changes_nothing(worker):
    _, done = await worker.generate(picture(12), request_id="done")

    _, answer = await worker.post("/cancel/done", {})

    assert answer["cancelled"] is False
    assert (await worker.get("/result/done"))[1]["output"] == done["output"]


async def hang_up_once_accepted(worker, graph, request_id):
    async with anyio.create_task_group() as caller:
        caller.start_soon(lambda: worker.generate(graph, request_id=request_id))
        while (await worker.get(f"/result/{request_id}"))[0] == 404:  # noqa: ASYNC110 - a process has no event of ours
            await anyio.sleep(0.02)
        caller.cancel_scope.cancel()


async def test_a_caller_who_hangs_up_and_stays_away_cancels_its_job(worker):
    await hang_up_once_accepted(worker, picture(13, gate="never"), "left")

    status, answer = await worker.settled("left")

    assert status == 499
    assert "hung up" in answer["message"]


async def test_a_caller_who_comes_straight_back_joins_its_job(worker):
    before = sum((await worker.renders()).values())
    graph = picture(14, seconds=2.5)  # longer than the grace for those who come back
    await hang_up_once_accepted(worker, graph, "back")

    status, _ = await worker.generate(graph, request_id="back")

    assert status == 200
    assert sum((await worker.renders()).values()) == before + 1


async def test_an_accepted_job_needs_no_caller(worker):
    job = await accepted(worker, picture(15, seconds=2.5))

    assert (await worker.result(job))[0] == 200


async def test_a_deadline_stops_the_work(worker):
    status, answer = await worker.generate(picture(16, gate="never"), deadline_s=1)

    assert status == 422
    assert answer["error"]["code"] == "deadline_exceeded"


async def test_a_job_that_waits_too_long_gives_its_place_back(worker):
    running = await accepted(worker, picture(17, gate="long"))
    second = await accepted(worker, picture(18, seconds=0.5))

    status, answer = await worker.generate(picture(19), max_queue_wait_s=0.5)

    assert status == 503
    assert answer["error"]["code"] == "queue_wait_exceeded"
    worker.open_gate("long")
    assert [(await worker.result(job))[0] for job in (running, second)] == [200, 200]


async def test_a_full_queue_says_when_to_come_back(worker):
    jobs = []
    for number in range(20):  # six wait; one renders and one stands ready behind it, once the worker took them up
        body = {"input": {"workflow_json": picture(30 + number, seconds=0.6, gate="full")}}
        async with worker.session.post(f"{worker.base_url}/generate", json=body) as answer:
            status, told = answer.status, await answer.json()
            retry_after = answer.headers.get("Retry-After", "")
        if status != 202:
            break
        jobs.append(told["id"])

    assert status == 503
    assert told["error"]["code"] == "queue_full"
    assert 1 <= int(retry_after) <= 10
    assert 6 <= len(jobs) <= 8
    worker.open_gate("full")
    for job in jobs:
        assert (await worker.result(job))[0] == 200


async def frames_of(worker, *, method="POST", path="/generate/stream", body=None, headers=None):
    async with worker.session.request(method, worker.base_url + path, json=body, headers=headers or {}) as answer:
        assert answer.content_type == "text/event-stream"
        text = (await answer.read()).decode()
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("id"), json.loads(lines["data"])))
    return found


async def test_a_stream_tells_the_way_and_ends_with_the_result(worker):
    graph = {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["4", 1]}},
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["6", 0],
                "latent_image": ["5", 0],
                "seed": "__RANDOM_INT__",
                "steps": 4,
                "cfg": 1,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "fox"}},
    }
    frames = await frames_of(worker, body={"input": {"workflow_json": graph, "request_id": "streamed"}})

    statuses = [frame["status"] for _, frame in frames]
    assert statuses[0] == "queued"
    assert statuses[-1] == "final_result"
    assert list(dict.fromkeys(statuses)) == [
        "queued",
        "processing",
        "generating",
        "generated",
        "completed",
        "final_result",
    ]
    assert {"message", "timestamp", "elapsed_time", "queue_position", "queue_info"} <= set(frames[0][1])
    result = frames[-1][1]["result"]
    assert result["status"] == "completed"
    updates = result["comfyui_response"]["execution_details"]["progress_updates"]
    assert [one["value"] for one in updates] == [1, 2, 3, 4]
    assert updates[-1]["percentage"] == 100

    # Coming back after the third event: the rest, and nothing twice.
    third = frames[2][0]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": third}
    rest = await frames_of(worker, method="GET", path="/result/streamed", headers=headers)
    assert [one for one, _ in rest] == [one for one, _ in frames[3:]]


async def test_a_template_and_its_parameters_make_a_workflow(worker):
    body = {"input": {"modifier": "Text2Image", "modifications": {"prompt": "a fox", "steps": 2, "seed": 7}}}
    status, answer = await worker.post("/generate/sync", body)

    assert status == 200
    prompt = next(iter(answer["comfyui_response"].values()))["prompt"][2]
    assert prompt["6"]["inputs"]["text"] == "a fox"
    assert prompt["3"]["inputs"]["steps"] == 2

    body["input"]["modifications"] = {"pompt": "typo"}
    status, answer = await worker.post("/generate/sync", body)
    assert status == 400
    assert "pompt" in answer["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
        ({"Content-Type": "application/json", "Host": "evil.example"}, 403),
    ],
)
async def test_a_web_page_cannot_post_jobs(worker, headers, status):
    body = json.dumps({"input": {"workflow_json": picture(50)}})
    async with worker.session.post(f"{worker.base_url}/generate/sync", data=body, headers=headers) as answer:
        assert answer.status == status


async def test_bad_bodies_get_a_400_that_names_the_field(worker):
    cases = [
        (b"{", "body"),
        (b"[]", "input"),
        (b"{}", "input"),
        (b'{"input": {}}', "workflow_json"),
        (b'{"input": {"workflow_json": []}}', "workflow_json"),
        (b'{"input": {"workflow_json": "text"}}', "workflow_json"),
        (b'{"input": {"workflow_json": {"1": {"class_type": "EmptyImage", "inputs": {}}}, "s3": 5}}', "s3"),
        (b'{"input": {"workflow_json": {}, "deadline_s": -1}}', "deadline_s"),
    ]
    for body, named in cases:
        headers = {"Content-Type": "application/json"}
        async with worker.session.post(f"{worker.base_url}/generate", data=body, headers=headers) as answer:
            found = await answer.json()
            assert answer.status == 400, body
            assert named in found["message"], body
            assert found["status"] == "failed"

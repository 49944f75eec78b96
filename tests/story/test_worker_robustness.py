"""What kills or wedges the known wrapper, and must not touch ours: each row of the baselines' section 7 is a promise.

One real worker over one fake engine process serves the whole file; what needs a kill has a worker of its own.
"""

from __future__ import annotations

import aiohttp
import anyio
import pytest

from comfyfleet.testing.processes import a_worker, fake_engine, picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def worker(tmp_path_factory):
    async with a_worker(tmp_path_factory.mktemp("worker")) as running:
        yield running


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


KILLERS = {
    "an unreachable node without inputs": {"class_type": "EmptyImage"},
    "… with null inputs": {"class_type": "EmptyImage", "inputs": None},
    "… with a list as inputs": {"class_type": "EmptyImage", "inputs": []},
    "… with text as inputs": {"class_type": "EmptyImage", "inputs": "text"},
    "an input nested 900 deep": {"class_type": "EmptyImage", "inputs": {"width": nested(900)}},
    "a null node": None,
    "a list as class_type": {"class_type": ["EmptyImage"], "inputs": {}},
}


@pytest.mark.parametrize("killer", KILLERS.values(), ids=KILLERS.keys())
async def test_a_graph_that_kills_comfyui_is_refused_before_it_gets_there(worker, killer):
    status, answer = await worker.generate({**picture(1), "bad": killer})

    assert status in (400, 422)
    assert answer["status"] == "failed"
    assert "bad" in answer["message"]
    assert answer["error"]["details"]["node_id"] == "bad"

    status, _ = await worker.generate(picture(2))
    assert status == 200


async def test_a_chain_of_two_thousand_nodes_is_refused_in_one_sentence(worker):
    chain = {"0": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 1}}}
    for number in range(1, 2000):
        chain[str(number)] = {"class_type": "FakeSleep", "inputs": {"images": [str(number - 1), 0], "seconds": 0}}
    chain["save"] = {"class_type": "SaveImage", "inputs": {"images": ["1999", 0], "filename_prefix": "x"}}

    status, answer = await worker.generate(chain)

    assert status == 422
    assert len(answer["message"]) < 200


async def test_a_link_to_a_node_that_is_not_there_is_refused_by_node_and_input_under_the_callers_id(worker):
    graph = picture(3)
    graph["9"] = {"class_type": "SaveImage", "inputs": {"images": ["77", 0], "filename_prefix": "x"}}

    status, answer = await worker.generate(graph, request_id="dangling")

    assert (status, answer["id"]) == (422, "dangling")
    assert (answer["error"]["details"]["node_id"], answer["error"]["details"]["input"]) == ("9", "images")
    assert "node '77', which is not in the workflow" in answer["message"]


async def test_every_refusal_has_the_one_shape_and_carries_the_callers_id(worker):
    shape = {"id", "message", "status", "comfyui_response", "output", "timings", "miniature", "error"}
    wrong_method = await worker.get("/generate/sync")
    long_name = await worker.get(f"/result/{'a' * 300}")
    cycle = {"1": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}}
    private = await worker.generate(picture(4), request_id="mine", webhook={"url": "http://127.0.0.1:1/"})

    for status, answer in (wrong_method, long_name, private, refused := await worker.generate(cycle, request_id="own")):
        assert 400 <= status < 500
        assert set(answer) == shape
    assert (wrong_method[0], refused[1]["id"], private[1]["id"]) == (405, "own", "mine")
    assert long_name[1]["error"]["details"]["field"] == "path.job_id"
    assert private[1]["error"]["details"]["field"] == "input.webhook.url"


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "Content-Encoding"),
        ({"Content-Type": "text/plain"}, "Content-Type"),
    ],
)
@pytest.mark.parametrize("in_chunks", [True, False])
async def test_a_body_that_is_not_plain_json_is_refused_by_its_header(worker, headers, named, in_chunks):
    async def chunks():
        yield b'{"input": {}}'

    body = chunks() if in_chunks else b'{"input": {}}'
    async with (
        aiohttp.ClientSession() as caller,
        caller.post(worker.base_url + "/generate/sync", headers=headers, data=body) as answer,
    ):
        assert (answer.status, (await answer.json())["error"]["details"]["header"]) == (400, named)


async def test_a_prefix_from_windows_costs_no_second_render(worker):
    before = sum((await worker.renders()).values())
    status, answer = await worker.generate(picture(77, prefix="windows\\picture"))

    assert (status, answer["output"][0]["filename"]) == (200, "picture_00001_.png")
    assert answer["output"][0]["url"].partition("?")[0].endswith("/windows/picture_00001_.png")
    assert sum((await worker.renders()).values()) == before + 1


async def test_an_id_that_leaves_the_output_folder_is_refused_and_writes_nothing(worker):
    status, answer = await worker.generate(picture(3), request_id="../../escape/x")

    assert status == 400
    assert answer["error"]["details"]["field"] == "input.request_id"
    assert not (worker.folder / "escape").exists()


async def test_three_requests_at_once_with_one_id_render_once_and_get_one_answer(worker):
    before = sum((await worker.renders()).values())
    answers = []

    async def call():
        answers.append(await worker.generate(picture(4, seconds=0.2), request_id="same-id"))

    async with anyio.create_task_group() as callers:
        for _ in range(3):
            callers.start_soon(call)

    assert [status for status, _ in answers] == [200] * 3
    assert len({str(answer["output"]) for _, answer in answers}) == 1
    assert sum((await worker.renders()).values()) == before + 1


async def test_the_same_id_replays_a_finished_job_and_refuses_another_body(worker):
    _, first = await worker.generate(picture(5), request_id="replayed")
    before = sum((await worker.renders()).values())

    status, again = await worker.generate(picture(5), request_id="replayed")
    assert status == 200
    assert again["output"] == first["output"]

    status, other = await worker.generate(picture(6), request_id="replayed")
    assert status == 422
    assert other["error"]["code"] == "idempotency_mismatch"
    assert sum((await worker.renders()).values()) == before


async def test_seventy_two_jobs_of_one_prefix_all_get_their_own_picture(worker):
    answers = {}

    async def caller(numbers):
        for number in numbers:
            answers[number] = await worker.generate(picture(0xFFFFFF - number, prefix="one"))

    async with anyio.create_task_group() as callers:
        for first in range(8):
            callers.start_soon(caller, range(first, 72, 8))

    assert [status for status, _ in answers.values()] == [200] * 72
    seen = {answer["output"][0]["sha256"] for _, answer in answers.values()}
    assert len(seen) == 72


async def test_a_loopback_url_as_input_is_refused_and_a_title_is_only_a_title(worker):
    graph = picture(7)
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": "http://127.0.0.1:9/secret.png"}}
    status, answer = await worker.generate(graph)
    assert status == 422
    assert answer["error"]["details"]["node_id"] == "1"
    assert answer["error"]["details"]["input"] == "image"

    graph = picture(8)
    graph["1"]["_meta"] = {"title": "http://127.0.0.1:9/hit"}
    status, _ = await worker.generate(graph)
    assert status == 200


async def test_health_means_that_a_picture_was_rendered(worker):
    status, health = await worker.get("/health")

    assert status == 200
    assert health["ready"] is True
    assert health["backends_healthy"] == "1/1"


async def test_killing_the_worker_loses_none_of_twenty_accepted_jobs(tmp_path):
    engine = fake_engine(tmp_path / "engine")
    engine.start()
    try:
        await engine.until("/system_stats")
        async with a_worker(tmp_path, backends=(engine.base_url,)) as worker:
            for number in range(20):
                status, _ = await worker.generate(
                    picture(number, prefix=f"twenty/{number}", seconds=0.15), path="/generate", request_id=f"j{number}"
                )
                assert status == 202
            for number in range(3):
                await worker.result(f"j{number}")
            worker.kill()
            worker.start()
            await worker.until("/health")

            answers = [await worker.result(f"j{number}") for number in range(20)]

        assert [status for status, _ in answers] == [200] * 20
        assert all(answer["output"][0]["sha256"] for _, answer in answers)
        starts = [line for line in engine.ledger if line.startswith("start") and "canary" not in line]
        assert len(starts) == len(set(starts)) == 20
    finally:
        engine.kill()


async def test_killing_the_engine_in_mid_job_runs_the_job_again_and_none_fails(tmp_path):
    async with a_worker(tmp_path) as worker:
        accepted = []
        for number in range(6):
            gate = "held" if number == 0 else ""  # held, so that the engine dies in the first one
            _, answer = await worker.generate(picture(number, gate=gate), path="/generate")
            accepted.append(answer["id"])
        await worker.misbehave(killed=1)
        worker.open_gate("held")

        answers = [await worker.result(job_id) for job_id in accepted]
        status, health = await worker.get("/health")

    assert [status for status, _ in answers] == [200] * 6
    assert status == 200
    assert health["backends"][0]["restarts"] == 1
    done = [line for line in worker.ledger if line.startswith("done")]
    assert len(done) == 6


async def test_a_foreign_engine_that_is_away_costs_waiting_jobs_only_time(tmp_path):
    engine = fake_engine(tmp_path / "engine")
    engine.start()
    try:
        await engine.until("/system_stats")
        async with a_worker(tmp_path, backends=(engine.base_url,)) as worker:
            for number in range(8):
                await worker.generate(picture(number, seconds=0.2), path="/generate", request_id=f"a{number}")
            engine.kill()
            await anyio.sleep(4)
            engine.start()
            answers = [await worker.result(f"a{number}") for number in range(8)]
            status, _ = await worker.get("/health")
    finally:
        engine.kill()

    assert [status for status, _ in answers] == [200] * 8
    assert status == 200

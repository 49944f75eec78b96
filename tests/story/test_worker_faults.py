"""Faults of engines: whose they are, what happens to the job, and what its caller is told."""

from __future__ import annotations

import anyio
import pytest

from comfyfleet.testing.processes import a_worker, picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def worker(tmp_path_factory):
    async with a_worker(tmp_path_factory.mktemp("worker")) as running:
        yield running


async def test_out_of_memory_frees_the_engine_and_runs_the_job_once_more(worker):
    await worker.misbehave(oom=1)

    status, answer = await worker.generate(picture(1))

    assert status == 200
    assert answer["output"][0]["url"]


async def test_out_of_memory_twice_is_the_jobs_own_fault(worker):
    status, answer = await worker.generate(picture(2, fault="oom"))

    assert status == 422
    assert answer["error"]["details"]["fault"] == "out_of_memory"
    assert answer["error"]["details"]["node_id"] == "3"
    assert "memory" in answer["message"]


async def test_a_nodes_own_error_reaches_the_caller_without_server_paths(worker):
    status, answer = await worker.generate(picture(3, fault="error"))

    assert status == 422
    assert answer["error"]["code"] == "job_failed"
    details = answer["error"]["details"]
    assert (details["node_id"], details["class_type"]) == ("3", "FakeFault")
    assert details["exception_type"] == "ValueError"
    assert details["exception_message"] == "this node always fails"
    assert answer["comfyui_response"]["execution_details"]["completed"] is False
    assert "fake_run.py" not in str(answer)
    assert "traceback" not in str(answer)


async def test_one_bad_output_of_two_refuses_the_whole_job_and_renders_nothing(worker):
    before = await worker.renders()
    graph = {
        **picture(4),
        "20": {"class_type": "SaveImage", "inputs": {"images": ["1", 5], "filename_prefix": "bad"}},
    }

    status, answer = await worker.generate(graph)

    assert status == 422
    assert answer["error"]["code"] == "workflow_refused"
    assert answer["error"]["details"]["node_id"] == "20"
    await worker.generate(picture(5))
    assert len(await worker.renders()) <= len(before) + 2  # the withdrawn one may have begun; it is no one's answer


@pytest.mark.parametrize("queues", [True, False])
async def test_a_500_from_the_engine_proves_nothing_and_costs_no_render(worker, queues):
    before = sum((await worker.renders()).values())
    await worker.misbehave(post_500=1, post_500_queues=queues)

    status, _ = await worker.generate(picture(6 + queues))

    assert status == 200
    assert sum((await worker.renders()).values()) == before + 1


async def test_a_deaf_socket_costs_a_poll_and_not_the_job(worker):
    await worker.misbehave(socket_silent=True)
    status, _ = await worker.generate(picture(8))
    await worker.misbehave(socket_silent=False)

    assert status == 200


async def test_dropped_sockets_and_a_late_history_lose_nothing(worker):
    await worker.misbehave(history_late_s=0.2)
    statuses = []

    async def call(number):
        statuses.append((await worker.generate(picture(10 + number, seconds=0.2)))[0])

    async with anyio.create_task_group() as callers:
        for number in range(3):
            callers.start_soon(call, number)
        await anyio.sleep(0.3)
        await worker.misbehave(drop_sockets=True)
    await worker.misbehave(history_late_s=0)

    assert statuses == [200] * 3


async def test_a_cached_repeat_has_files_of_its_own_and_says_so(worker):
    _, first = await worker.generate(picture(20, prefix="twice"))
    status, again = await worker.generate(picture(20, prefix="twice"))

    assert status == 200
    assert (first["reused"], again["reused"]) == (False, True)
    assert again["output"][0]["sha256"] == first["output"][0]["sha256"]
    assert again["output"][0]["local_path"] != first["output"][0]["local_path"]


async def test_a_cached_repeat_whose_files_are_gone_is_made_again(worker):
    await worker.generate(picture(21, prefix="gone"))
    for path in (worker.folder / "data").glob("workers/standalone/engine/output-0/gone_*"):
        path.unlink()

    status, again = await worker.generate(picture(21, prefix="gone"))

    assert status == 200
    assert again["reused"] is False
    assert again["output"][0]["size_bytes"] > 0
    assert "nonce" not in str(again)


async def test_force_renders_again(worker):
    await worker.generate(picture(22))
    before = sum((await worker.renders()).values())

    status, again = await worker.generate(picture(22), force=True)

    assert (status, again["reused"]) == (200, False)
    assert again["comfyui_response"]["execution_details"]["nodes_executed"] == ["1", "9"]
    assert sum((await worker.renders()).values()) == before + 1


async def test_a_long_silent_node_is_not_taken_for_a_dead_engine(worker):
    status, _ = await worker.generate(picture(23, seconds=10))
    _, health = await worker.get("/health")

    assert status == 200
    assert health["backends"][0]["restarts"] == 0


async def test_a_dead_worker_thread_behind_healthy_http_is_noticed_and_its_job_runs_again(tmp_path):
    async with a_worker(tmp_path) as worker:
        await worker.misbehave(worker_dies=1)
        with anyio.fail_after(120):
            status, _ = await worker.generate(picture(1))
        _, health = await worker.get("/health")

    assert status == 200
    assert health["backends"][0]["restarts"] == 1


async def test_a_poisoned_gpu_gets_a_new_process_and_after_a_second_time_no_more_work(tmp_path):
    async with a_worker(tmp_path) as worker:
        await worker.misbehave(device_assert=1)
        status, _ = await worker.generate(picture(1))
        assert status == 200

        status, answer = await worker.generate(picture(2, fault="device_assert"))
        assert status == 503 or answer["error"]["details"]["fault"] == "device"
        status, health = await worker.get("/health")
        assert status == 503
        assert health["backends"][0]["state"] == "quarantined"

        status, answer = await worker.generate(picture(3))
        assert status == 503
        assert answer["error"]["code"] == "engine_unavailable"

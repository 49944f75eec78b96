"""What the control plane says to a worker, over real HTTP: to one of ours, to a public PyWorker, and to a dying one."""

from __future__ import annotations

import msgspec
import pytest

from comfyfleet.control.worker_calls import Alive, Ended, News, OnlySynchronous, Refused, Taken, Unreachable
from support.http_worker import HttpWorker

pytestmark = pytest.mark.anyio
RESULT = {"id": "j", "status": "completed", "message": "", "output": [], "timings": {}}


async def test_our_worker_takes_the_job_and_is_shown_the_ticket():
    async with HttpWorker() as worker:
        worker.answers["/generate"] = (202, {"id": "j", "status": "queued"}, {})

        assert await worker.calls.start(worker.ticket(), b'{"input":{"request_id":"j"}}') == Taken()

    ((_, call),) = worker.heard
    assert call["payload"] == {"input": {"request_id": "j"}}
    assert {"cost", "endpoint", "reqnum", "request_idx", "signature", "url"} <= call["auth_data"].keys()


async def test_a_public_pyworker_knows_only_the_synchronous_route():
    async with HttpWorker() as worker:
        worker.answers["/generate/sync"] = (200, RESULT, {})

        told = await worker.calls.start(worker.ticket(), b'{"input":{}}')
        ended = await worker.calls.wait_for(worker.ticket(), b'{"input":{}}')

    assert told == OnlySynchronous()
    assert isinstance(ended, Ended)
    assert msgspec.json.decode(ended.body) == RESULT
    assert [path for path, _ in worker.heard] == ["/generate", "/generate/sync"]


@pytest.mark.parametrize(
    ("status", "answer", "body"),
    [
        (200, {"job": 1}, {"job": 1, "status": "completed"}),
        (200, "[1, 2]", {"response": [1, 2], "status": "completed"}),
        (200, "a line", {"response": "a line", "status": "completed"}),
        pytest.param(200, "[" * 9999, {"response": "[" * 9999, "status": "completed"}, id="too deep to be read"),
        (500, {**RESULT, "status": "failed"}, {**RESULT, "status": "failed"}),
    ],
)
async def test_whatever_a_public_pyworkers_model_answers_is_the_jobs_end(status, answer, body):
    async with HttpWorker() as worker:
        worker.answers["/generate/sync"] = (status, answer, {})

        ended = await worker.calls.wait_for(worker.ticket(), b'{"input":{}}')

    assert isinstance(ended, Ended)
    assert msgspec.json.decode(ended.body) == body


async def test_an_empty_500_of_a_public_pyworker_says_nothing_about_the_job():
    async with HttpWorker() as worker:
        worker.answers["/generate/sync"] = (500, "", {})

        refused = await worker.calls.wait_for(worker.ticket(), b'{"input":{}}')

    assert (refused.status, refused.retry_after_s) == (500, 1.0)


@pytest.mark.parametrize(
    ("status", "code", "headers", "retry_after_s"),
    [
        (503, "queue_full", {"Retry-After": "7"}, 7.0),
        (503, "engine_unavailable", {}, 1.0),
        (429, "", {}, 1.0),
        (401, "unauthorized", {}, 1.0),
        (422, "workflow_refused", {}, None),
        (400, "bad_request", {}, None),
        (413, "payload_too_large", {}, None),
    ],
)
async def test_a_refusal_says_whether_waiting_helps(status, code, headers, retry_after_s):
    body = {
        "id": "",
        "status": "failed",
        "message": "no",
        "error": {"code": code, "message": "no", "details": {"a": 1}},
    }
    async with HttpWorker() as worker:
        worker.answers["/generate"] = (status, body if code else "", headers)

        refused = await worker.calls.start(worker.ticket(), b"{}")

    assert isinstance(refused, Refused)
    assert (refused.status, refused.retry_after_s) == (status, retry_after_s)
    assert refused.code == (code or f"worker_{status}")


async def test_a_job_that_failed_by_itself_has_ended():
    body = {
        "id": "j",
        "status": "failed",
        "message": "m",
        "error": {"code": "job_failed", "message": "m", "details": {}},
    }
    async with HttpWorker() as worker:
        worker.answers["/generate"] = (422, body, {})

        assert isinstance(await worker.calls.start(worker.ticket(), b"{}"), Ended)


async def test_progress_and_result_arrive_however_the_bytes_are_cut():
    whole = (
        b'id: 1\ndata: {"status":"generating","progress":{"percentage":50}}\n\n: still here\n\n'
        b'data: {"status":"final_result","result":' + msgspec.json.encode({**RESULT, "big": "x" * 300_000}) + b"}\n\n"
    )
    async with HttpWorker() as worker:
        worker.answers["/result/j"] = (200, [whole[:30], whole[30:31], whole[31:]], {})

        heard = [item async for item in worker.calls.follow(worker.ticket(), "j")]

    taken, progress, silent, end = heard
    assert isinstance(progress, News)
    assert progress.frame["progress"] == {"percentage": 50}
    assert taken == silent == Alive(), "it has the job, and still has it"
    assert isinstance(end, Ended)
    assert len(msgspec.json.decode(end.body)["big"]) == 300_000


async def test_a_stream_that_breaks_off_is_not_an_end():
    async with HttpWorker() as worker:
        worker.answers["/result/j"] = (200, [b'data: {"status":"generating"}\n\n'], {})

        with pytest.raises(Unreachable):
            _ = [item async for item in worker.calls.follow(worker.ticket(), "j")]


async def test_a_worker_that_is_not_there_is_unreachable_and_cannot_be_cancelled_at():
    async with HttpWorker() as worker:
        ticket = worker.ticket()
        await worker.runner.cleanup()

        with pytest.raises(Unreachable):
            await worker.calls.start(ticket, b"{}")
        assert not await worker.calls.cancel(ticket, "j")
        assert not await worker.calls.withdraw(ticket, "j")


@pytest.mark.parametrize(
    ("status", "is_cancelled", "is_withdrawn"),
    [(200, True, True), (404, False, True), (401, False, False), (503, False, False)],
)
async def test_a_worker_that_does_not_know_a_job_yet_was_not_told_to_cancel_it(status, is_cancelled, is_withdrawn):
    async with HttpWorker() as worker:
        worker.answers["/cancel/j"] = (status, {}, {})

        assert await worker.calls.cancel(worker.ticket(), "j") is is_cancelled
        assert await worker.calls.withdraw(worker.ticket(), "j") is is_withdrawn

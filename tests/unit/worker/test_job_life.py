"""The transition table, the event log, and what a journal keeps."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from comfyfleet.sealing import Sealer
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import JobCancelled
from comfyfleet.wire.generation import GenerateInput, S3Target
from comfyfleet.wire.jobs import RUN_FINAL, RUN_TRANSITIONS, IllegalTransition, RunStatus
from comfyfleet.worker.api import generate
from comfyfleet.worker.api.generate import GenerateRoutes
from comfyfleet.worker.job import MAX_EVENTS, EventLog, Finished, Job
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.limits import DeadlineExceeded, QueueWaitExceeded, reason_to_stop


def a_job(**fields):
    given_ = {
        "id": "job",
        "scope": "",
        "key": "job",
        "folder": "job",
        "request": GenerateInput(),
        "fingerprint": "f",
        "accepted_at": 1000.0,
        "prompt_id": "prompt",
        **fields,
    }
    return Job(**given_)


@given(st.lists(st.sampled_from(list(RunStatus)), max_size=12))
def test_any_sequence_of_wishes_leaves_a_job_in_a_reachable_state_and_ends_it_at_most_once(wishes):
    job = a_job()
    ends = 0
    for wanted in wishes:
        allowed = wanted in RUN_TRANSITIONS[job.status]
        try:
            job.advance(wanted, 1.0)
        except IllegalTransition:
            assert not allowed
            continue
        assert allowed
        ends += wanted in RUN_FINAL
    assert ends <= 1
    assert [event.number for event in job.events.events] == list(range(1, len(job.events.events) + 1))


def test_who_wants_to_hear_of_the_end_is_told_at_once_where_it_has_come_already():
    job, heard = a_job(), []
    job.when_ended(heard.append)
    assert not heard

    job.finished = Finished(status=RunStatus.COMPLETED, http_status=200, body=b"{}")
    job.when_ended(heard.append)

    assert heard == [job]
    assert job.followers == [heard.append]


def test_every_status_can_still_end():
    for status in RunStatus:
        reachable, waiting = set(), [status]
        while waiting:
            current = waiting.pop()
            if current not in reachable:
                reachable.add(current)
                waiting.extend(RUN_TRANSITIONS[current])
        assert reachable & RUN_FINAL


@pytest.mark.anyio
async def test_a_reader_gets_what_was_what_comes_and_the_end():
    log = EventLog()
    log.add(1.0, RunStatus.QUEUED, "one")
    seen = []

    async def read():
        async for event in log.follow(after=0):
            seen.append(event.message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        log.add(2.0, RunStatus.PROCESSING, "two")
        await anyio.wait_all_tasks_blocked()
        log.add(3.0, RunStatus.COMPLETED, "three")
        log.close()

    assert seen == ["one", "two", "three"]
    assert [event.message async for event in log.follow(after=2)] == ["three"]


def test_a_full_log_drops_progress_and_never_a_change_of_status():
    log = EventLog()
    log.add(0.0, RunStatus.GENERATING, "begun")
    for step in range(MAX_EVENTS + 50):
        log.add(1.0, RunStatus.GENERATING, "step", progress=float(step))
    log.add(2.0, RunStatus.COMPLETED, "done")

    messages = [event.message for event in log.events]
    assert len(messages) == MAX_EVENTS
    assert (messages[0], messages[-1]) == ("begun", "done")


def test_limits_stop_a_job_for_a_reason_it_can_read():
    def why(job, *, now=1000.0, ticks=0.0):
        return reason_to_stop(job, now, ticks, grace_s=1.5, eta_s=lambda one: 7.0)

    late = a_job(request=GenerateInput(deadline_s=10))
    assert why(late, now=1009.9) is None
    assert isinstance(why(late, now=1010.0), DeadlineExceeded)

    patient = a_job(request=GenerateInput(max_queue_wait_s=5))
    found = why(patient, now=1006.0)
    assert isinstance(found, QueueWaitExceeded)
    assert found.retry_after_s == 7.0
    patient.advance(RunStatus.PROCESSING, 1.0)
    patient.advance(RunStatus.GENERATING, 1.0)
    assert why(patient, now=1006.0) is None

    left = a_job(left_at=100.0)
    assert why(left, ticks=101.4) is None
    assert isinstance(why(left, ticks=101.6), JobCancelled)
    assert why(a_job(left_at=100.0, callers=1), ticks=999.0) is None
    assert why(a_job(left_at=100.0, abandonable=False), ticks=999.0) is None


@pytest.fixture
def sealer():
    return Sealer(bytes(32), "journal")


@pytest.mark.anyio
async def test_an_accepted_job_is_there_after_a_restart_and_a_finished_one_stays_finished(tmp_path, sealer):
    journal = Journal(tmp_path / "journal.sqlite3", sealer)
    job = a_job(request=GenerateInput(workflow_json={"1": {}}, s3=S3Target(secret_access_key="hush-hush")))
    await journal.accept(job)
    await journal.close()
    assert b"hush-hush" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())

    journal = Journal(tmp_path / "journal.sqlite3", sealer)
    (again,) = journal.open_jobs()
    assert again.request.s3.secret_access_key == "hush-hush"
    end = Finished(status=RunStatus.COMPLETED, http_status=200, body=b'{"id":"job"}')
    assert await journal.finish(again, end, 2000.0) is True
    assert await journal.finish(again, end, 2001.0) is False
    assert journal.open_jobs() == []
    found = journal.find(scope="", key="job")
    assert found.finished == end
    assert journal.find(scope="other", key="job") is None
    await journal.forget_before(2000.5, lambda job: job.finished_at + 60)
    assert journal.outlived_folders(2059) == []
    assert journal.outlived_folders(2060) == ["job"]
    assert journal.find(scope="", key="job") is None
    await journal.close()


@pytest.mark.anyio
async def test_writes_that_wait_together_share_a_commit_and_a_bad_one_spoils_no_other(tmp_path, sealer):
    journal = Journal(tmp_path / "journal.sqlite3", sealer)
    failed = []

    async def good(number):
        await journal.accept(a_job(id=f"j{number}", key=f"j{number}"))

    async def bad():
        try:
            await journal.write(lambda db: db.execute("INSERT INTO nowhere VALUES (1)"))
        except sqlite3.OperationalError as error:
            failed.append(str(error))

    async with anyio.create_task_group() as writers:
        for number in range(50):
            writers.start_soon(good, number)
            if number % 10 == 0:
                writers.start_soon(bad)

    assert len(failed) == 5
    assert [job.id for job in journal.open_jobs()] == [f"j{number}" for number in range(50)]
    await journal.close()


@pytest.mark.anyio
async def test_a_request_sealed_under_a_lost_key_is_left_out_and_the_others_are_not(tmp_path, sealer):
    journal = Journal(tmp_path / "journal.sqlite3", Sealer(b"x" * 32, "journal"))
    await journal.accept(a_job(id="lost", key="lost"))
    await journal.close()
    journal = Journal(tmp_path / "journal.sqlite3", sealer)
    await journal.accept(a_job(id="kept", key="kept"))

    assert [job.id for job in journal.open_jobs()] == ["kept"]
    await journal.close()


@pytest.mark.anyio
async def test_a_follower_of_a_silent_job_hears_that_the_worker_is_alive(monkeypatch):
    monkeypatch.setattr(generate, "_PING_S", 0.01)
    view = SimpleNamespace(position=1, eta_s=None, waiting=0, generating=0, storing=0)
    service = SimpleNamespace(queue_view=lambda _job: view, hung_up=lambda _job: None)
    routes = GenerateRoutes(service, FakeClock(), max_body_bytes=1, include_response=True)
    job, frames = a_job(), []
    with anyio.fail_after(60):
        async for frame in routes.follow(job, Headers()).body_iterator:
            frames.append(frame)
            if len(frames) == 2:
                job.advance(RunStatus.PROCESSING, 1001.0)
            if len(frames) == 3:
                job.advance(RunStatus.FAILED, 1002.0)
                job.finished = Finished(status=RunStatus.FAILED, http_status=422, body=b"{}")
                job.events.close()
                job.done.set()

    assert frames[:2] == [b": still here\n\n"] * 2
    assert [b"processing" in frames[2], b"failed" in frames[3], b"final_result" in frames[4]] == [True] * 3
    assert len(frames) == 5

"""One lease's life, over a real store and real HTTP: every way it can end."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from comfyfleet.clock import SystemClock
from comfyfleet.control.admission import SEALED, JobSecrets
from comfyfleet.control.job_feed import JobFeed
from comfyfleet.control.job_run import JobRun
from comfyfleet.control.jobs import Job, Lease, rank
from comfyfleet.control.keys import Vault
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_calls import Unreachable
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.control.workers import Workers
from comfyfleet.wire.generation import WebhookTarget
from comfyfleet.wire.jobs import JobStatus
from support.http_worker import HttpWorker

pytestmark = pytest.mark.anyio
VAULT = Vault(b"m" * 64)
DONE = {"id": "j", "status": "completed", "message": "", "output": [], "timings": {}}
FINAL = b'data: {"status":"final_result","result":' + msgspec.json.encode(DONE) + b"}\n\n"


class Leased:
    """A job leased to worker 7 at `worker`, and its run."""

    def __init__(self, folder, worker: HttpWorker, **fields) -> None:
        self.worker = worker
        self.clock = SystemClock()
        self.store = open_sqlite(folder / "control.sqlite3")
        self.workers = Workers()
        self.feed = JobFeed()
        self._fields = fields

    async def __aenter__(self):
        now = self.clock.now()
        values = {
            "id": "j",
            "endpoint_id": 1,
            "scope": "key:1",
            "status": JobStatus.QUEUED,
            "priority": 0,
            "cost": 100.0,
            "rank": rank(now, 0),
            "created_at": now,
            "not_before": 0.0,
            "input": '{"workflow_json":{},"request_id":"mine"}',
            "digest": "d",
        }
        await self.store.add_jobs([Job(**{**values, **self._fields})])
        lease = Lease(
            job_id="j",
            token="t",
            leased_at=now,
            expires_at=now + 30,
            worker_id=7,
            worker_url=self.worker.url,
            request_idx=2,
        )
        job = msgspec.structs.replace(await self.store.lease(lease), started_at=self._fields.get("started_at"))
        state = {"id": 7, "endpoint_id": 1, "group_id": 1, "mtoken": "m", "created_at": now}
        self.workers.add(Worker(**state, state=WorkerState.IDLE, url=self.worker.url), now)
        self.run = JobRun(
            job,
            store=self.store,
            workers=self.workers,
            calls=self.worker.calls,
            feed=self.feed,
            vault=VAULT,
            clock=self.clock,
            ticket_for=lambda _job: self.worker.ticket(),
            cancelled=self.feed.cancel_event("j"),
            lost_after_s=0.2,
        )
        return self

    async def __aexit__(self, *_error):
        await self.store.close()

    async def stored(self) -> Job:
        return await self.store.job("j")


async def test_a_job_that_completes_keeps_the_workers_result(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate"] = (202, {"id": "j", "status": "queued"}, {})
        worker.answers["/result/j"] = (200, [b'data: {"status":"generating","message":"m"}\n\n', FINAL], {})

        outcome = await leased.run.run(worker.ticket())

        job = await leased.stored()
        assert (outcome.status, job.status) == (JobStatus.COMPLETED, JobStatus.COMPLETED)
        assert msgspec.json.decode(job.result) == DONE
        kinds = [event.kind for event in await leased.store.events("j")]
        assert kinds == ["queued", "leased", "running", "progress", "completed"]
    payload = worker.heard[0][1]["payload"]["input"]
    assert payload["request_id"] == "j"


async def test_the_worker_gets_the_callers_s3_keys_and_never_the_webhook(tmp_path):
    secrets = JobSecrets(s3={"secret_access_key": "x"}, webhook=WebhookTarget(url="http://a", secret="s"))
    sealed = VAULT.seal(msgspec.json.encode(secrets).decode(), SEALED)
    async with HttpWorker() as worker, Leased(tmp_path, worker, sealed=sealed, webhook="sealed") as leased:
        worker.answers["/generate"] = (200, DONE, {})

        await leased.run.run(worker.ticket())

        assert await leased.store.undelivered() == ["j"]
    payload = worker.heard[0][1]["payload"]["input"]
    assert payload["s3"] == {"secret_access_key": "x"}
    assert "webhook" not in payload


async def test_an_input_that_was_sealed_whole_reaches_the_worker_whole(tmp_path):
    given = {"workflow_json": {}, "credentials": [{"url_prefix": "http://a", "headers": {"X-Key": "x"}}]}
    sealed = VAULT.seal(msgspec.json.encode(JobSecrets(input=msgspec.json.encode(given).decode())).decode(), SEALED)
    async with HttpWorker() as worker, Leased(tmp_path, worker, sealed=sealed, input="{}") as leased:
        worker.answers["/generate"] = (200, DONE, {})

        await leased.run.run(worker.ticket())

    assert worker.heard[0][1]["payload"]["input"] == {**given, "request_id": "j"}


async def test_an_end_whose_confirmation_was_lost_with_the_connection_counts_as_ours(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate"] = (200, DONE, {})
        finish, lost = leased.store.finish, []

        async def finish_unheard(*args, **kwargs):
            done = await finish(*args, **kwargs)
            if not lost:
                lost.append(done)
                raise ConnectionLost("cut off after the commit")
            return done

        leased.store.finish = finish_unheard

        outcome = await leased.run.run(worker.ticket())

        assert lost == [True]
        assert outcome.status is JobStatus.COMPLETED
        assert [event.kind for event in await leased.store.events("j")].count("completed") == 1


async def test_a_busy_worker_gives_the_job_back_for_as_long_as_it_said(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        refusal = {"status": "failed", "message": "full", "error": {"code": "queue_full", "message": "full"}}
        worker.answers["/generate"] = (503, refusal, {"Retry-After": "5"})

        outcome = await leased.run.run(worker.ticket())

        job = await leased.stored()
        assert (outcome.status, job.status, job.lost_on) == (None, JobStatus.QUEUED, frozenset())
        assert 4 < job.not_before - leased.clock.now() <= 5


async def test_a_refused_workflow_fails_with_the_workers_words(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        error = {"code": "workflow_refused", "message": "no", "details": {"node_id": "4"}}
        worker.answers["/generate"] = (422, {"status": "failed", "error": error}, {})

        await leased.run.run(worker.ticket())

        job = await leased.stored()
        assert (job.status, msgspec.json.decode(job.error)) == (JobStatus.FAILED, error)


async def test_a_worker_that_had_nothing_to_say_for_long_is_asked_again_before_it_is_lost(tmp_path):
    """As while one node runs for minutes: the stream times out, and the worker still has the job."""
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate"] = (202, {"id": "j", "status": "queued"}, {})
        worker.answers["/result/j"] = (200, [FINAL], {})
        follow, tries = worker.calls.follow, []

        async def silent_at_first(ticket, job_id):
            tries.append(job_id)
            if len(tries) == 1:
                await anyio.sleep(0.3)  # longer than a worker may be out of reach here
                raise Unreachable("the worker was silent for long")
            async for heard in follow(ticket, job_id):
                yield heard

        worker.calls.follow = silent_at_first
        outcome = await leased.run.run(worker.ticket())

        job = await leased.stored()
    assert (outcome.status, job.status, job.lost_on) == (JobStatus.COMPLETED, JobStatus.COMPLETED, frozenset())
    assert len(tries) == 2


async def test_a_stream_that_breaks_off_is_followed_again(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate"] = (202, {"status": "queued"}, {})
        worker.scripts["/result/j"] = [(200, [b'data: {"status":"generating"}\n\n'], {}), (200, [FINAL], {})]

        outcome = await leased.run.run(worker.ticket())

        assert outcome.status is JobStatus.COMPLETED
        assert [path for path, _ in worker.heard] == ["/generate", "/result/j", "/result/j"]


async def test_a_worker_that_forgot_the_job_gives_it_back(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        gone = {"status": "failed", "error": {"code": "not_found", "message": "no such job"}}
        worker.answers["/result/j"] = (404, gone, {})

        outcome = await leased.run.run(None)

        assert outcome.status is None
        assert (await leased.stored()).status is JobStatus.QUEUED


async def test_a_lost_workers_job_waits_for_another_and_the_third_loss_is_the_last(tmp_path):
    for folder, lost, status in (("a", [], JobStatus.QUEUED), ("b", [7, 7], JobStatus.FAILED)):
        lost_workers = msgspec.json.encode(lost).decode()
        async with HttpWorker() as worker, Leased(tmp_path / folder, worker, lost_workers=lost_workers) as leased:
            await worker.runner.cleanup()

            outcome = await leased.run.run(worker.ticket())

            job = await leased.stored()
            assert job.status is status
            assert outcome.is_left_behind == (status is JobStatus.QUEUED)
            assert leased.workers.known(7).is_suspect
            if status is JobStatus.QUEUED:
                assert job.lost_on == {7}
            else:
                assert msgspec.json.decode(job.error)["code"] == "poison_job"


async def test_a_worker_that_has_the_job_from_an_earlier_lease_with_more_time_left_is_followed(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        error = {"code": "idempotency_mismatch", "message": "used with another body"}
        worker.answers["/generate"] = (422, {"status": "failed", "error": error}, {})
        worker.answers["/result/j"] = (200, [FINAL], {})

        outcome = await leased.run.run(worker.ticket())

    assert outcome.status is JobStatus.COMPLETED


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_run_takes_its_own_time_be_it_the_second_or_begun_by_a_control_plane_that_is_gone(tmp_path, is_ours):
    an_hour_ago = SystemClock().now() - 3600.0
    async with HttpWorker() as worker, Leased(tmp_path, worker, started_at=an_hour_ago) as leased:
        worker.answers["/generate"] = (200, DONE, {})
        worker.answers["/result/j"] = (200, [FINAL], {})

        outcome = await leased.run.run(worker.ticket() if is_ours else None)

    assert outcome.status is JobStatus.COMPLETED
    assert outcome.seconds < 60 if is_ours else 3600 <= outcome.seconds < 3660


async def test_a_result_under_a_lost_lease_is_dropped(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate"] = (200, DONE, {})
        await leased.store.take_over("j", old_token="t", token="somebody's", expires_at=1e12)

        outcome = await leased.run.run(worker.ticket())

        assert outcome.status is None
        assert (await leased.stored()).status is JobStatus.LEASED


async def test_a_public_pyworkers_500_is_tried_again_and_not_for_ever(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate/sync"] = (500, "", {})
        first = await leased.run.run(worker.ticket())
        again = await leased.stored()
    async with HttpWorker() as worker, Leased(tmp_path / "third", worker, attempts=2) as leased:
        worker.answers["/generate/sync"] = (500, "", {})
        third = await leased.run.run(worker.ticket())
        error = msgspec.json.decode((await leased.stored()).error)

    assert (first.status, again.status) == (None, JobStatus.QUEUED)
    assert (third.status, error["code"]) == (JobStatus.FAILED, "worker_500")


async def test_a_job_at_a_public_pyworker_is_over_at_its_deadline(tmp_path):
    deadline_at = SystemClock().now() + 0.3
    async with HttpWorker() as worker, Leased(tmp_path, worker, deadline_at=deadline_at) as leased:
        worker.held.add("/generate/sync")

        with anyio.fail_after(60):
            outcome = await leased.run.run(worker.ticket())
        job = await leased.stored()

    assert (outcome.status, job.status) == (JobStatus.FAILED, JobStatus.FAILED)
    assert msgspec.json.decode(job.error)["code"] == "deadline_exceeded"
    assert job.finished_at >= deadline_at


@pytest.mark.parametrize("status", [{"completed": True}, ["done"], None, 7, "success"])
async def test_a_public_pyworkers_answer_is_the_jobs_result_whatever_it_calls_its_status(tmp_path, status):
    """As a ComfyUI history entry, whose `status` is an object."""
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate/sync"] = (200, {"outputs": {}, "status": status}, {})

        outcome = await leased.run.run(worker.ticket())
        job = await leased.stored()

    assert (outcome.status, job.status) == (JobStatus.COMPLETED, JobStatus.COMPLETED)
    assert msgspec.json.decode(job.result) == {"outputs": {}, "status": status}


async def test_a_cancel_that_overtook_the_job_on_its_way_to_the_worker_is_told_again(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate"] = (202, {"id": "j", "status": "queued"}, {})
        worker.held.add("/result/j")
        unknown = {"status": "failed", "error": {"code": "not_found", "message": "no such job"}}
        worker.scripts["/cancel/j"] = [(404, unknown, {}), (200, {}, {})]
        leased.feed.cancel("j")
        async with anyio.create_task_group() as group:
            group.start_soon(leased.run.run, worker.ticket())
            with anyio.fail_after(60):
                while worker.scripts["/cancel/j"]:
                    await worker.news()
            group.cancel_scope.cancel()


async def test_a_job_whose_answer_cannot_be_kept_fails_and_is_not_made_again(tmp_path):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.answers["/generate"] = (200, DONE, {})
        finish = leased.store.finish

        async def finish_without_result(*args, result, **kwargs):
            if result is not None:
                raise ValueError("no column takes it")
            return await finish(*args, result=result, **kwargs)

        leased.store.finish = finish_without_result

        outcome = await leased.run.run(worker.ticket())
        job = await leased.stored()

    assert (outcome.status, job.status) == (JobStatus.FAILED, JobStatus.FAILED)
    assert msgspec.json.decode(job.error)["code"] == "internal_error"


@pytest.mark.parametrize("how", ["cancelled", "its worker is gone"])
async def test_a_job_at_a_public_pyworker_is_hung_up_on(tmp_path, how):
    async with HttpWorker() as worker, Leased(tmp_path, worker) as leased:
        worker.held.add("/generate/sync")
        async with anyio.create_task_group() as group:

            async def meddle() -> None:
                await worker.asked("/generate/sync")
                if how == "cancelled":
                    leased.feed.cancel("j")
                else:
                    leased.workers.move(7, WorkerState.ERROR, leased.clock.now())

            group.start_soon(meddle)
            outcome = await leased.run.run(worker.ticket())
        status = (await leased.stored()).status

    expected = JobStatus.CANCELLED if how == "cancelled" else None
    assert outcome.status == expected
    assert status == (expected or JobStatus.QUEUED)

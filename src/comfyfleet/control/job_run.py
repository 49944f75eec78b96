"""One lease's life: hand the job to its worker, follow it to its end, and write that down under the lease's token.

The lease is renewed for as long as this runs. Whatever happens, the job ends in one of three ways: finished (the
token held), given back to wait again, or left alone because the lease is somebody else's by now.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import anyio
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.admission import SEALED, JobSecrets
from comfyfleet.control.job_feed import JobFeed
from comfyfleet.control.jobs import Job
from comfyfleet.control.keys import Vault
from comfyfleet.control.leases import GIVEN_BACK_S, LEASE_S, LOST_AFTER_S, RENEW_EVERY_S, Fate, Silence, fate
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.worker_calls import (
    Alive,
    Ended,
    News,
    OnlySynchronous,
    Refused,
    Taken,
    Unreachable,
    WorkerCalls,
)
from comfyfleet.control.workers import Workers
from comfyfleet.wire.errors import FleetError, IdempotencyMismatch
from comfyfleet.wire.jobs import JobStatus
from comfyfleet.wire.routing import RouteReady

log = structlog.get_logger()
Saved = TypeVar("Saved")

PROGRESS_EVERY_S = 0.5
SAVE_AT_MOST_S = 60.0
_RECONNECT_S = 0.5
# A public PyWorker answers 500 for whatever went wrong, a broken workflow included: tried again, but not for ever.
_SYNCHRONOUS_TRIES = 3
_NOT_KEPT = msgspec.json.encode(
    {"code": FleetError.code, "message": "its answer could not be kept; the log says why", "details": {}}
).decode()
_BUSY = frozenset({408, 425, 429, 503})


# A worker of ours stops such a job by itself; one of another make does not know its deadline. In our worker's words.
_OVERDUE = Refused(
    status=422, code="deadline_exceeded", message="not done by its deadline", details={}, retry_after_s=None
)


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a lease ended. status None: the job waits again, or the lease was lost.

    is_left_behind: its worker may come back and find the job in its journal; it is to be told to drop it.
    """

    job: Job
    status: JobStatus | None
    seconds: float = 0.0
    reason: str = ""
    is_left_behind: bool = False


def how_it_ended(body: bytes) -> tuple[JobStatus, str | None]:
    """(status, error as JSON text) that a worker's JSON object tells. Raises NOT_JSON.

    A public PyWorker passes its model's answer on, in which `status` may mean anything: only our own words say more
    than that it is done.
    """
    result = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    said = bytes(result.get("status", msgspec.Raw(b"")))
    if said == b'"cancelled"':
        return JobStatus.CANCELLED, None
    if said == b'"failed"':
        return JobStatus.FAILED, bytes(result.get("error", msgspec.Raw(b'{"code":"job_failed"}'))).decode()
    return JobStatus.COMPLETED, None


class JobRun:
    """A leased job. `ticket_for` makes a fresh ticket to the worker it is on, or None when nobody knows the worker."""

    def __init__(
        self,
        job: Job,
        *,
        store: Store,
        workers: Workers,
        calls: WorkerCalls,
        feed: JobFeed,
        vault: Vault,
        clock: Clock,
        ticket_for: Callable[[Job], RouteReady | None],
        cancelled: anyio.Event,
        lost_after_s: float = LOST_AFTER_S,
        owns: Callable[[], bool] = lambda: True,
    ) -> None:
        """cancelled: fires when the caller wants the job no more.

        owns: whether this control plane may act for the job's endpoint now; where not, the run holds still.
        """
        assert job.lease_token is not None  # noqa: S101 - a run exists for a leased job only
        self._job = job
        self._token = job.lease_token
        self._store = store
        self._workers = workers
        self._calls = calls
        self._feed = feed
        self._vault = vault
        self._clock = clock
        self._ticket_for = ticket_for
        self._cancelled = cancelled
        self._lost_after_s = lost_after_s
        self._owns = owns
        self._is_cancel_asked = bool(job.cancel_requested)
        self._silent_since: float | None = None  # its worker did not answer then, nor since
        self._told_at = 0.0
        self._began_at = 0.0
        self._is_synchronous = False
        self._is_taken_over = False

    async def run(self, ticket: RouteReady | None) -> RunOutcome:
        """ticket: to start the job with; None for one that a worker has already (after our restart)."""
        outcome: RunOutcome | None = None
        self._is_taken_over = ticket is None
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep_lease, group.cancel_scope, name="lease")
            group.start_soon(self._hear_cancel, name="cancel")
            outcome = await self._work(ticket)
            group.cancel_scope.cancel()
        return outcome or RunOutcome(job=self._job, status=None, reason="the lease was lost")

    async def _work(self, ticket: RouteReady | None) -> RunOutcome:
        started: Taken | OnlySynchronous | Ended | Refused | None = Taken() if ticket is None else None
        while True:
            try:
                if started is None and ticket is not None:
                    while not self._owns():
                        await self._clock.sleep(_RECONNECT_S)
                    started = await self._calls.start(ticket, self._payload())
                    self._silent_since = None
                    if isinstance(started, OnlySynchronous):
                        started = await self._wait_for(ticket)
                    elif isinstance(started, Refused) and started.code == IdempotencyMismatch.code:
                        # It has our job from an earlier lease: only the time that was left then is another.
                        started = Taken()
                if isinstance(started, Ended):
                    return await self._ended(started)
                if isinstance(started, Refused):
                    return await self._refused(started)
                return await self._follow()
            except Unreachable as error:
                if (outcome := await self._unreachable(str(error))) is not None:
                    return outcome
                # It may have arrived: from here on ask for it, and only a plain "no such job" hands it over again.
                started = Taken()
                await self._clock.sleep(_RECONNECT_S)

    async def _wait_for(self, ticket: RouteReady) -> Ended | Refused:
        """By a worker whose connection is the job: hung up on at a cancel, the deadline, or the loss of the worker."""
        if not await self._began():
            raise Unreachable("the lease was lost")
        found: Ended | Refused | Unreachable = Unreachable("its worker is gone")
        self._is_synchronous = True
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch_synchronous, group.cancel_scope, name="watch")
            try:
                found = await self._calls.wait_for(ticket, self._payload())
            except Unreachable as error:
                found = error
            group.cancel_scope.cancel()
        if isinstance(found, Unreachable) and self._is_overdue():
            return _OVERDUE
        if isinstance(found, Unreachable):
            raise found
        return found

    def _is_overdue(self) -> bool:
        return self._job.deadline_at is not None and self._clock.now() >= self._job.deadline_at

    async def _watch_synchronous(self, call: anyio.CancelScope) -> None:
        worker_id = self._job.worker_id or 0
        while not self._is_cancel_asked and not self._is_overdue():
            now = self._clock.now()
            here = Silence(since=now, lost_after_s=self._lost_after_s)  # the open connection says nothing else
            if fate(self._job, self._workers.get(worker_id), here, now) is not Fate.WAIT:
                break
            await self._clock.sleep(_RECONNECT_S)
        call.cancel()

    async def _began(self) -> bool:
        """Write down once that it runs; False when the lease is somebody else's."""
        if self._began_at:
            return True
        self._began_at = self._clock.now()
        if not await self._saved(partial(self._store.start, self._job.id, token=self._token, now=self._began_at)):
            return False
        self._feed.news(self._job.id)
        return True

    def _payload(self) -> bytes:
        """The input as the worker gets it: secrets put back, our id as its request_id, the webhook left out."""
        secrets = JobSecrets()
        if self._job.sealed:
            secrets = msgspec.json.decode(self._vault.open(self._job.sealed, SEALED), type=JobSecrets)
        given = msgspec.json.decode(secrets.input or self._job.input, type=dict[str, msgspec.Raw])
        given["request_id"] = msgspec.Raw(msgspec.json.encode(self._job.id))
        if secrets.s3:
            given["s3"] = msgspec.Raw(msgspec.json.encode(secrets.s3))
        if self._job.deadline_at is not None:
            left_s = max(1.0, self._job.deadline_at - self._clock.now())
            given["deadline_s"] = msgspec.Raw(msgspec.json.encode(left_s))
        return msgspec.json.encode({"input": given})

    async def _follow(self) -> RunOutcome:
        if not await self._began():
            return RunOutcome(job=self._job, status=None, reason="the lease was lost")
        ticket = self._ticket_for(self._job)
        if ticket is None:
            raise Unreachable("the worker is not known any more")
        async for heard in self._calls.follow(ticket, self._job.id):
            self._silent_since = None
            if isinstance(heard, Alive):
                continue
            if isinstance(heard, News):
                await self._progress(heard)
            elif isinstance(heard, Ended):
                return await self._ended(heard)
            else:
                return await self._refused(heard)
        raise Unreachable("the stream ended")

    async def _progress(self, news: News) -> None:
        now = self._clock.now()
        if now - self._told_at < PROGRESS_EVERY_S:
            return
        self._told_at = now
        data = msgspec.json.encode({key: value for key, value in news.frame.items() if key != "id"}).decode()
        try:
            await self._store.add_event(self._job.id, kind="progress", data=data, now=now)
        except ConnectionLost:
            return  # progress is worth nothing by the time the database is back
        self._feed.news(self._job.id)

    async def _ended(self, ended: Ended) -> RunOutcome:
        try:
            status, error = how_it_ended(ended.body)
            return await self._finish(status, ended.body.decode(), error)
        except Exception:  # the stage boundary behind the answer: left alone it would be rendered again, for ever
            log.exception("job.answer_not_kept", job=self._job.id)
            return await self._finish(JobStatus.FAILED, None, _NOT_KEPT)

    async def _refused(self, refused: Refused) -> RunOutcome:
        """Not taken: another worker, or a little later; final only where no retry can help."""
        if self._is_cancel_asked:
            return await self._finish(JobStatus.CANCELLED, None, None)
        if refused.status == 404:
            return await self._give_back("the worker does not have it any more", 0.0)
        is_hopeless = self._is_synchronous and refused.status not in _BUSY and self._job.attempts >= _SYNCHRONOUS_TRIES
        if refused.retry_after_s is not None and not is_hopeless:
            return await self._give_back(
                f"the worker answered {refused.status}: {refused.message}", refused.retry_after_s
            )
        error = {"code": refused.code, "message": refused.message, "details": refused.details}
        return await self._finish(JobStatus.FAILED, None, msgspec.json.encode(error).decode())

    async def _unreachable(self, why: str) -> RunOutcome | None:
        if not self._owns():
            return None  # what we know of the worker may be old
        if self._is_cancel_asked:
            return await self._finish(JobStatus.CANCELLED, None, None)
        worker_id, now = self._job.worker_id or 0, self._clock.now()
        # From the first call that failed: a worker that had nothing to say for long is asked again before it is lost.
        self._silent_since = now if self._silent_since is None else self._silent_since
        silence = Silence(since=self._silent_since, lost_after_s=self._lost_after_s)
        decided = fate(self._job, self._workers.get(worker_id), silence, now)
        if decided is Fate.WAIT:
            return None
        log.warning("lease.lost", job=self._job.id, worker=worker_id, why=why, next=str(decided))
        if self._workers.get(worker_id) is not None:
            self._workers.suspect(worker_id, now)  # or the job, which waits again, would go straight back to it
        if decided is Fate.POISON:
            error = {
                "code": "poison_job",
                "message": "its worker was lost three times; it is not tried again",
                "details": {"worker_ids": sorted(self._job.lost_on | {worker_id})},
            }
            return await self._finish(JobStatus.FAILED, None, msgspec.json.encode(error).decode())
        reason = f"worker {worker_id} was lost ({why})"
        return await self._requeue(reason, lost_worker=worker_id, wait_s=0.0)

    async def _give_back(self, reason: str, after_s: float) -> RunOutcome:
        return await self._requeue(reason, lost_worker=None, wait_s=max(GIVEN_BACK_S, after_s))

    async def _requeue(self, reason: str, *, lost_worker: int | None, wait_s: float) -> RunOutcome:
        """Put the job back into the queue, not to be tried before `wait_s`; over, if it was cancelled meanwhile."""
        now = self._clock.now()
        status = await self._saved(
            partial(
                self._store.requeue,
                self._job.id,
                token=self._token,
                lost_worker=lost_worker,
                not_before=now + wait_s,
                reason=reason,
                now=now,
            )
        )
        if status is None:
            return RunOutcome(job=self._job, status=None, reason="the lease was lost")
        if status is JobStatus.CANCELLED:
            return RunOutcome(job=self._job, status=status, seconds=self._run_s(now))
        return RunOutcome(job=self._job, status=None, reason=reason, is_left_behind=lost_worker is not None)

    async def _finish(self, status: JobStatus, result: str | None, error: str | None) -> RunOutcome:
        now, is_ours = self._clock.now(), False
        with anyio.move_on_after(SAVE_AT_MOST_S, shield=True):  # a result that we have must not be lost to a shutdown
            is_ours = await self._saved(
                partial(
                    self._store.finish,
                    self._job.id,
                    token=self._token,
                    status=status,
                    result=result,
                    error=error,
                    now=now,
                )
            ) or await self._saved(partial(self._is_written, status, now))
        if not is_ours:
            return RunOutcome(job=self._job, status=None, reason="the lease was lost")
        return RunOutcome(job=self._job, status=status, seconds=self._run_s(now))

    def _run_s(self, now: float) -> float:
        """What this run took. Only one that was taken over began before us; an earlier run is none of its time."""
        began = (self._job.started_at if self._is_taken_over else None) or self._began_at or now
        return now - began

    async def _is_written(self, status: JobStatus, finished_at: float) -> bool:
        """Our end is there already: the commit was done and its confirmation lost with the connection."""
        job = await self._store.job(self._job.id)
        return job is not None and (job.status, job.finished_at) == (status, finished_at)

    async def _saved(self, change: Callable[[], Awaitable[Saved]]) -> Saved:
        """Make the change, however long the database is away meanwhile."""
        while True:
            try:
                return await change()
            except ConnectionLost:
                await self._clock.sleep(_RECONNECT_S)

    async def _keep_lease(self, scope: anyio.CancelScope) -> None:
        while True:
            await self._clock.sleep(RENEW_EVERY_S)
            expires_at = self._clock.now() + LEASE_S
            renew = partial(self._store.renew, self._job.id, token=self._token, expires_at=expires_at)
            if not await self._saved(renew):
                scope.cancel()
                return
            # Another replica may have taken the cancel call.
            try:
                job = await self._store.job(self._job.id)
            except ConnectionLost:
                continue
            if job is not None and job.cancel_requested:
                self._cancelled.set()

    async def _hear_cancel(self) -> None:
        """Pass a cancel on to the worker; its answer comes by the stream we follow."""
        if not self._is_cancel_asked:
            await self._cancelled.wait()
            self._is_cancel_asked = True
        while True:
            ticket = self._ticket_for(self._job)
            if ticket is not None and await self._calls.cancel(ticket, self._job.id):
                return
            await self._clock.sleep(1.0)

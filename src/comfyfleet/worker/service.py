"""`JobService`: the only way in for the wrapper's API and for the agent. Submit, wait, cancel, follow, read, ask.

It owns every live job and the queue. A job's key (`scope` and request id) is honoured here: a repeat joins the live job
or gets the finished one's answer, another body under the same key is refused. Scopes cannot see each other.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import anyio
import anyio.abc
import msgspec
import structlog
from anyio.lowlevel import checkpoint

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.settings.worker import QueueSettings
from comfyfleet.wire.errors import (
    EngineUnavailable,
    FleetError,
    IdempotencyMismatch,
    JobCancelled,
    NotFound,
    QueueFull,
    ShuttingDown,
)
from comfyfleet.wire.generation import GenerateInput, GenerateResult
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.wire.requests import check_request
from comfyfleet.wire.shapes import shape_of
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.arrivals import Arrivals
from comfyfleet.worker.engines.learned import Durations
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot, EngineState
from comfyfleet.worker.job import Finished, Job, RunEvent
from comfyfleet.worker.job_book import JobBook
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.pipeline import Pipeline, Stages
from comfyfleet.worker.queue import QueueView, WaitingLine, estimate
from comfyfleet.worker.readiness import health_report, start_failure
from comfyfleet.worker.rendered import Rendered
from comfyfleet.worker.resume import graph_again, whose
from comfyfleet.worker.stages.prepare import build_graph
from comfyfleet.worker.templates import Templates
from comfyfleet.worker.upkeep import Sweep, save_learned

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode
_result_decoder = msgspec.json.Decoder(GenerateResult)
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class JobService:
    """Build it, then keep `run` running: jobs move only while it does."""

    def __init__(
        self,
        *,
        pool: EnginePool,
        stages: Stages,
        journal: Journal,
        templates: Templates,
        settings: QueueSettings,
        durations: Durations,
        clock: Clock,
        ids: Ids,
        on_finished: Callable[[Job, float], None] = lambda job, seconds: None,
    ) -> None:
        self._pool = pool
        self._stages = stages
        self._journal = journal
        self._templates = templates
        self._settings = settings
        self._durations = durations
        self._clock = clock
        self._ids = ids
        self._on_finished = on_finished
        self._line = WaitingLine()
        self._book = JobBook(journal)
        self._arrivals = Arrivals(self._book, journal)
        self._pipeline: Pipeline | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._draining = False
        self.refusal: FleetError | None = None  # why nothing new is taken, set by who watches the disk
        self.facts: dict[str, Any] = {}  # what others of this worker add to /health

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Resume what the journal holds, then move jobs until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self._pipeline = Pipeline(
                pool=self._pool,
                stages=self._stages,
                journal=self._journal,
                durations=self._durations,
                clock=self._clock,
                ids=self._ids,
                tasks=tasks,
                left_queue=self._left_queue,
                stuck_limit_s=self._settings.stuck_limit_s,
            )
            learned = self._journal.load_learned()
            if learned:
                self._durations.load(learned)
            sweep = Sweep(
                self._book,
                self._clock,
                grace_s=self._settings.drop_grace_s,
                eta_s=lambda job: self.queue_view(job).eta_s,
                stop=self._stop,
            )
            tasks.start_soon(self._resume)
            tasks.start_soon(sweep.run)
            task_status.started()
            await save_learned(self._journal, self._durations, self._clock)

    async def submit(self, request: GenerateInput, *, scope: str = "", key: str = "", abandonable: bool = False) -> Job:
        """Accept, join or replay. Returns when the job is on disk.

        key: names the job within `scope` where the request has no id of its own. abandonable: cancel it when the last
        caller hung up. Raises BadRequest, WorkflowRefused, IdempotencyMismatch, QueueFull, EngineUnavailable.
        """
        check_request(request)
        self._stages.check(request)
        fingerprint = hashlib.sha256(_encode_sorted(request)).hexdigest()
        key = request.request_id or key
        if key:
            known = await self._arrivals.known(scope, key)
            if known is not None and not _may_run_again(known):
                if known.fingerprint != fingerprint:
                    raise IdempotencyMismatch(f"request_id {key} was used with another body", field="request_id")
                if not abandonable and not known.is_final:
                    known.abandonable = False
                    await self._journal.keep(known)
                return known
        self._admit()
        graph = build_graph(request, self._templates)
        job_id = request.request_id or self._ids.request_id()
        job = Job(
            id=job_id,
            scope=scope,
            key=key or job_id,
            folder=self._folder(request.request_id, scope) or job_id,
            request=request,
            fingerprint=fingerprint,
            accepted_at=self._clock.now(),
            prompt_id=self._ids.request_id(),
            shape=shape_of(graph),
            abandonable=abandonable,
        )
        self._enter(job, graph)
        await self._arrivals.accept(job)
        self._queue(job)
        return job

    async def wait(self, job: Job) -> Finished:
        """The job's end. A caller that is cancelled while waiting has hung up."""
        job.callers += 1
        try:
            await job.done.wait()
        finally:
            self.hung_up(job)
        if job.finished is None:
            raise ShuttingDown("the worker is stopping; the job runs when it is back", retry_after_s=5)
        return job.finished

    def hung_up(self, job: Job) -> None:
        """A caller that was counted in `job.callers` waits no more."""
        job.callers -= 1
        job.left_at = self._clock.monotonic()

    def get(self, job_id: str, *, scope: str = "") -> Job:
        """A live, recent or journaled job of this scope. Raises NotFound."""
        job = self._book.get(job_id, scope)
        if job is None:
            raise NotFound("there is no such job", request_id=job_id)
        return job

    async def cancel(self, job_id: str, *, scope: str = "") -> Job:
        """Stop exactly this job, queued or running; returns at its end. A finished job stays as it is."""
        job = self.get(job_id, scope=scope)
        if not job.is_final:
            self._stop(job, JobCancelled("Cancelled."))
            await job.done.wait()
        return job

    async def events(self, job: Job, *, after: int = 0) -> AsyncIterator[RunEvent]:
        """The job's log from number `after` on, live until its end."""
        async for event in job.events.follow(after):
            yield event

    def queue_view(self, job: Job | None = None) -> QueueView:
        """Counts and estimates now; with `job`, its place."""
        now = self._clock.monotonic()
        engines = [slot.backlog_s(now) for slot in self._pool.slots if slot.state is not EngineState.QUARANTINED]
        return estimate(
            self._line.jobs,
            self._book.live(),
            engines=engines,
            predicted_s=lambda one: self._durations.run_s(one.shape),
            job=job,
            limit=self._settings.max_queue_size,
        )

    @property
    def is_ready(self) -> bool:
        return bool(self._pool.ready) and not self._draining and self.refusal is None

    @property
    def engines(self) -> list[EngineSlot]:
        return self._pool.slots

    def health(self) -> dict[str, Any]:
        """Ready or not, and every engine's state."""
        why = "draining" if self._draining else str(self.refusal or "")
        return {**health_report(self._pool.slots, self.queue_view(), is_ready=self.is_ready, why=why), **self.facts}

    async def signed_again(self, job: Job) -> Finished:
        """A finished job's answer with links that are valid from now on."""
        if job.finished is None:
            raise NotFound("the job has no result yet")
        if job.finished.status is not RunStatus.COMPLETED:
            return job.finished
        result = _result_decoder.decode(job.finished.body)
        await self._stages.resign(result.output, job.request)
        return replace(job.finished, body=_encode(result))

    def live_jobs(self) -> list[Job]:
        return self._book.live()

    def live_folders(self) -> set[str]:
        return {job.folder for job in self._book.live()}

    def drain(self) -> None:
        """Accept nothing more; what is accepted goes on."""
        self._draining = True

    def by_key(self, scope: str, key: str) -> Job | None:
        """A live or recent job by its key."""
        return self._book.by_key(scope, key)

    def warm_models(self) -> tuple[str, ...]:
        """Model files that some engine has in its memory, as far as is known; sorted."""
        return tuple(sorted({name for slot in self.engines for name in slot.warm}))

    def engine_version(self) -> str:
        """What the first engine says it is; "" before it answered."""
        return next((slot.version for slot in self._pool.slots if slot.version), "")

    def trouble(self) -> str:
        """Why no engine will ever take work without somebody's help, or ""."""
        if self.refusal is not None:
            return self.refusal.message
        return self._pool.slots[0].reason if self._pool.is_hopeless else start_failure(self._pool.slots)

    def live_graphs(self) -> list[Graph]:
        return self._book.graphs()

    def _admit(self) -> None:
        if self._draining or self._tasks is None:
            raise ShuttingDown("the worker is draining", retry_after_s=5)
        if self.refusal is not None:
            raise self.refusal
        if self._pool.is_hopeless:
            raise EngineUnavailable(f"no engine can work: {self._pool.slots[0].reason}", retry_after_s=60)
        if len(self._line) + len(self._arrivals) >= self._settings.max_queue_size:
            view = self.queue_view()
            raise QueueFull(
                f"{view.waiting} jobs wait already", retry_after_s=view.next_place_s, queue_size=view.waiting
            )

    def _folder(self, request_id: str, scope: str) -> str:
        """The output folder's name where the caller chose the id: that one, unless another scope uses the same."""
        if request_id and scope and self._journal.knows_folder(request_id, but_scope=scope):
            return f"{request_id}-{hashlib.sha256(scope.encode()).hexdigest()[:8]}"
        return request_id

    def _enter(self, job: Job, graph: Graph) -> None:
        self._book.enter(job, graph)
        job.events.add(job.accepted_at, RunStatus.QUEUED, "Waiting in the queue.")

    def _queue(self, job: Job) -> None:
        """Into the line, or to its end at once where it was stopped while it was written."""
        if job.stopped_by is not None and self._tasks is not None:
            self._tasks.start_soon(self._run_job, job, None)
            return
        self._line.add(job)
        self._start_next()

    def _start_next(self) -> None:
        """Let waiting jobs begin, a few ahead of the engines: their inputs are fetched while others render."""
        if self._tasks is None:
            return
        ahead = 2 * max(1, len(self._pool.slots)) + 1
        while (job := self._line.next_to_start(ahead)) is not None:
            self._tasks.start_soon(self._run_job, job, None)

    def _left_queue(self, job: Job) -> None:
        self._line.remove(job)
        self._start_next()

    async def _run_job(self, job: Job, adopted: EngineSlot | None, rendered: Rendered | None = None) -> None:
        if self._pipeline is None:
            return
        try:
            if job.request.webhook.events and self._tasks is not None:
                self._tasks.start_soon(self._stages.follow, job)
            finished = await self._pipeline.run(job, self._book.graph(job), adopted, rendered)
            await self._finish(job, finished)
        finally:
            self._line.remove(job)
            self._start_next()

    async def _finish(self, job: Job, finished: Finished) -> None:
        now = self._clock.now()
        # The webhook is promised first: after a crash in between, promising again changes nothing.
        try:
            await self._stages.notify(job, finished)
        except Exception:  # the stage boundary: a webhook that cannot be promised must not lose the result
            log.exception("webhook.not_promised", job=job.id)
        try:
            await self._journal.finish(job, finished, now)
        except (sqlite3.Error, OSError):
            # A full disk, most likely. The caller gets the result; a restart would run the job again.
            log.exception("journal.not_written", job=job.id)
        job.finished = finished
        self._book.retire(job)
        job.events.close()
        job.done.set()
        # Who waits goes first, and uvloop writes at the end of a turn: the log and the figures follow in the next one.
        await checkpoint()
        await checkpoint()
        while job.followers:
            job.followers.pop()(job)
        self._on_finished(job, now - job.accepted_at)
        log.info(
            "job.finished",
            job=job.id,
            status=finished.status.value,
            http=finished.http_status,
            engine=job.engine,
            total_s=round(now - job.accepted_at, 3),
            fault=job.fault,
            retries=len(job.earlier_faults),
        )

    def _stop(self, job: Job, reason: FleetError) -> None:
        """End a job from outside. One that has not begun gets its task only to end."""
        job.stop(reason)
        if self._line.take(job) and self._tasks is not None:
            self._tasks.start_soon(self._run_job, job, None)

    async def _resume(self) -> None:
        """Jobs that a former process accepted: store what it had rendered, adopt what an engine still has, queue the
        rest in their order."""
        jobs: list[Job] = []
        for job in self._journal.open_jobs():
            graph = graph_again(job, self._templates)
            job.shape, job.abandonable = shape_of(graph), False
            self._enter(job, graph)
            rendered = self._stages.kept_render(job)
            if rendered is not None and self._tasks is not None:
                self._tasks.start_soon(self._run_job, job, None, rendered)
            else:
                jobs.append(job)
        if not jobs or self._tasks is None:
            return
        log.info("journal.resumed", jobs=len(jobs))
        owner = await whose(self._pool, [job.prompt_id for job in jobs], self._clock)
        for job in jobs:
            slot = owner.get(job.prompt_id)
            if job.is_final or job.stopped_by is not None:
                self._tasks.start_soon(self._run_job, job, None)
            elif slot is not None:
                self._tasks.start_soon(self._run_job, job, slot)
            else:
                # Whatever became of its prompt, it is not there any more: another run, another id.
                job.prompt_id = self._ids.request_id()
                await self._journal.attempt(job)
                self._queue(job)


def _may_run_again(job: Job) -> bool:
    """A job that ended in a way a retry can mend does not bind its key."""
    return job.finished is not None and job.finished.http_status in (499, 500, 503, 507)

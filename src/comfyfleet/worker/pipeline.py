"""A job's way through its stages, one task a job: prepare, fetch inputs, execute, store outputs.

Many jobs are on the way at once, each in another stage: while one renders, the next has its inputs fetched and its
prompt queued in the engine, and the one before is uploaded. Only this module moves a job's status. It decides nothing
about faults itself (`engines.faults`) and knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.wire.errors import DiskFull, EngineUnavailable, FleetError, JobFailed
from comfyfleet.wire.generation import GenerateInput, OutputEntry
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.wire.shapes import models_of
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker import answer
from comfyfleet.worker.engines.client import EngineGone, HistoryEntry
from comfyfleet.worker.engines.faults import Fault, FaultClass, FaultKind, Remedy, remedy_for
from comfyfleet.worker.engines.learned import Durations
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot
from comfyfleet.worker.engines.reach import place_inputs
from comfyfleet.worker.engines.watch import PromptWatch, SilenceLimits
from comfyfleet.worker.job import Finished, Job
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.rendered import Rendered
from comfyfleet.worker.stages.execute import RunEnd, adopt, execute, withdraw
from comfyfleet.worker.stages.fetch_inputs import FetchedInputs
from comfyfleet.worker.stages.history_files import Made, read_made
from comfyfleet.worker.stages.prepare import roll_dice, with_nonce

log = structlog.get_logger()

_PROGRESS_EVERY_S = 0.1
_WITHDRAW_S = 1.2  # of the two seconds that a cancel may take
_BURY_EVERY_S = 0.5
_UNKNOWN_RUN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages that know files and stores (`worker.stages`); the pipeline knows only what they promise."""

    fetch_inputs: Callable[[Graph, GenerateInput], Awaitable[FetchedInputs]]
    # Where a prompt's files are, by type, and the nodes whose files are gone.
    bring_outputs: Callable[[EngineSlot, Made, str], Awaitable[tuple[Mapping[str, Path], set[str]]]]
    expect_outputs: Callable[[str, Graph], None]  # its folders are wanted soon; called while the engine renders
    # A render whose files are long under way is kept over a restart; the other gives what a former process kept.
    keep_render: Callable[[Job, Rendered], Awaitable[None]]
    kept_render: Callable[[Job], Rendered | None]
    store_outputs: Callable[[Job, Rendered], Awaitable[list[OutputEntry]]]
    check: Callable[[GenerateInput], None]
    resign: Callable[[list[OutputEntry], GenerateInput], Awaitable[None]]
    notify: Callable[[Job, Finished], Awaitable[None]]
    follow: Callable[
        [Job], Coroutine[Any, Any, None]
    ]  # tells a job's progress to whoever asked for it, to the job's end


class Pipeline:
    """`run` takes one job to its end."""

    def __init__(
        self,
        *,
        pool: EnginePool,
        stages: Stages,
        journal: Journal,
        durations: Durations,
        clock: Clock,
        ids: Ids,
        tasks: anyio.abc.TaskGroup,
        left_queue: Callable[[Job], None],
        stuck_limit_s: float,
    ) -> None:
        self._pool = pool
        self._stages = stages
        self._journal = journal
        self._durations = durations
        self._clock = clock
        self._ids = ids
        self._tasks = tasks
        self._left_queue = left_queue
        self._stuck_limit_s = stuck_limit_s

    async def run(
        self, job: Job, graph: Graph | None, adopted: EngineSlot | None = None, rendered: Rendered | None = None
    ) -> Finished:
        """The job's end, whatever it is. Only the end of this process gets through as an exception."""
        entry: HistoryEntry | None = None
        outputs: list[OutputEntry] = []
        error: FleetError | None = None
        try:
            with anyio.CancelScope() as job.scope_of_run:
                if job.stopped_by is not None:
                    raise job.stopped_by
                job.advance(RunStatus.PROCESSING, self._clock.now())
                if not graph:
                    raise JobFailed("the workflow is gone")
                if rendered is None:
                    rendered = await self._render_anew(job, graph, adopted)
                else:
                    job.advance(RunStatus.GENERATING, self._clock.now(), message="Rendered before a restart.")
                entry = rendered.entry
                job.advance(RunStatus.GENERATED, self._clock.now())
                outputs = await self._stages.store_outputs(job, rendered)
        except FleetError as problem:
            error = problem
        except _RunFailed as failure:
            entry, error = failure.entry, failure.error
        except Exception as bug:  # the stage boundary: whatever it was, this job ends and the next goes on
            error = _first_fleet_error(bug)
            if error is None:
                log.exception("job.crashed", job=job.id)
                error = FleetError("internal error; the worker's log has it under this id")
        error = job.stopped_by or error
        now = self._clock.now()
        finished = answer.finished(job, entry=entry, outputs=outputs, error=error, now=now, full=True)
        job.advance(finished.status, now, message=error.message if error else "")
        return finished

    async def _render_anew(self, job: Job, graph: Graph, adopted: EngineSlot | None) -> Rendered:
        if adopted is None:
            fetched = await self._stages.fetch_inputs(graph, job.request)
            job.inputs, graph = fetched.files, roll_dice(fetched.graph, self._ids)
        rendered = await self._render(job, graph, adopted)
        await self._stages.keep_render(job, rendered)
        return rendered

    async def _render(self, job: Job, graph: Graph, adopted: EngineSlot | None) -> Rendered:
        """A success whose files are there."""
        avoid: frozenset[str] = frozenset()
        sent = with_nonce(graph, job.prompt_id) if job.request.force else graph
        while True:
            watch = job.watch = self._watch(job, graph)
            slot, end = await self._one_run(job, sent, watch, avoid, adopted)
            adopted = None
            fault = end.fault
            if fault is None and end.entry is not None:
                made = read_made(end.entry)
                try:
                    folders, missing = await self._stages.bring_outputs(slot, made, job.prompt_id)
                except EngineGone as gone:
                    fault = Fault(kind=FaultKind.ENGINE_LOST, message="the engine's files cannot be had", details={})
                    log.info("engine.pull_failed", engine=slot.name, error=str(gone))
                else:
                    if not missing:
                        self._learn(job, graph, watch, end.entry, slot)
                        return Rendered(entry=end.entry, made=made, folders=folders)
                    # A cached repeat whose files are gone: the same nodes again, past the cache.
                    fault = Fault(kind=FaultKind.OUTPUTS_GONE, message="the engine's files are gone", details={})
                    sent = with_nonce(graph, self._ids.request_id(), missing)
            if fault is None:
                raise EngineUnavailable("the engine gave no answer")
            await self._after_fault(job, slot, watch, fault, end.entry)
            avoid = frozenset({slot.name})

    async def _one_run(
        self, job: Job, graph: Graph, watch: PromptWatch, avoid: frozenset[str], adopted: EngineSlot | None
    ) -> tuple[EngineSlot, RunEnd]:
        prompt_id, predicted_s = job.prompt_id, self._durations.run_s(job.shape) or _UNKNOWN_RUN_S
        if adopted is not None:
            slot = adopted
            self._pool.adopt(slot, prompt_id, predicted_s)
        else:
            slot = await self._pool.acquire(prompt_id, predicted_s, avoid=avoid)
        job.engine = slot.name
        job.advance(RunStatus.GENERATING, self._clock.now())
        self._left_queue(job)
        is_over = False
        try:
            if adopted is None and job.inputs and not slot.owned:
                try:
                    await place_inputs(slot.client, slot.folders, slot.is_remote, job.inputs)
                except EngineGone as gone:
                    is_over = True
                    return slot, RunEnd(fault=Fault(kind=FaultKind.ENGINE_LOST, message=str(gone), details={}))
            end = await (adopt if adopted else _submitting(graph))(slot, watch, clock=self._clock)
            is_over = True
            return slot, end
        except FleetError:
            is_over = True
            raise
        finally:
            if is_over or await self._take_back(job, slot, prompt_id):
                self._pool.release(slot, prompt_id)

    async def _take_back(self, job: Job, slot: EngineSlot, prompt_id: str) -> bool:
        """After a cancel: ask the engine to stop, and wait a moment for it. False leaves the room booked."""
        if job.stopped_by is None:
            return True  # this process ends; the prompt is adopted by the next one
        gone = False
        with anyio.move_on_after(_WITHDRAW_S, shield=True):
            try:
                gone = await withdraw(slot.client, prompt_id)
                while not gone:
                    await self._clock.sleep(0.05)
                    gone = prompt_id not in await slot.client.queue()
            except EngineGone:
                gone = False
        if not gone:
            self._tasks.start_soon(self._bury, slot, prompt_id)
        return gone

    async def _bury(self, slot: EngineSlot, prompt_id: str) -> None:
        """A cancelled prompt in a node that cannot be stopped: its room is free when the engine says so.

        An engine of ours that is at it for too long gets a new process; a foreign one we can only wait for.
        """
        began = self._clock.monotonic()
        try:
            while True:
                if slot.owned and self._clock.monotonic() - began > self._stuck_limit_s:
                    slot.want_restart(FaultKind.STUCK)
                    return
                try:
                    if prompt_id not in await slot.client.queue():
                        return
                    await slot.client.interrupt(prompt_id)
                except EngineGone:
                    if slot.owned:
                        return
                await self._clock.sleep(_BURY_EVERY_S)
        finally:
            self._pool.release(slot, prompt_id)

    async def _after_fault(
        self, job: Job, slot: EngineSlot, watch: PromptWatch, fault: Fault, entry: HistoryEntry | None
    ) -> None:
        """Do what `remedy_for` says; returns when the job may run again."""
        lost_unstarted = fault.fault_class is FaultClass.ENGINE and entry is None and watch.started_at is None
        remedy = Remedy.RETRY if lost_unstarted else remedy_for(fault.kind, job.earlier_faults)
        job.fault = fault.kind
        log.info("job.fault", job=job.id, engine=slot.name, fault=fault.kind, remedy=remedy)
        if remedy in (Remedy.RESTART_AND_RETRY, Remedy.RESTART_AND_FAIL):
            slot.want_restart(fault.kind)
        if remedy is Remedy.FREE_AND_RETRY:
            try:
                await slot.client.free()
                slot.warm = frozenset()
            except EngineGone:
                log.info("engine.free_failed", engine=slot.name)
        if remedy in (Remedy.FAIL, Remedy.RESTART_AND_FAIL):
            raise _RunFailed(_error_of(fault), entry)
        if not lost_unstarted:
            job.earlier_faults = (*job.earlier_faults, fault.kind)
        job.prompt_id = self._ids.request_id()
        await self._journal.attempt(job)
        now = self._clock.now()
        job.advance(RunStatus.QUEUED, now, message=f"Again: {fault.message}.")
        job.advance(RunStatus.PROCESSING, now)

    def _watch(self, job: Job, graph: Graph) -> PromptWatch:
        def node_s(node_id: str) -> float:
            return self._durations.silence_limit_s(graph[node_id]["class_type"] if node_id in graph else "")

        limits = SilenceLimits(node_s=node_s, run_s=self._durations.run_limit_s(job.shape))
        return PromptWatch(job.prompt_id, clock=self._clock, told=self._teller(job, graph), limits=limits)

    def _teller(self, job: Job, graph: Graph) -> Callable[[PromptWatch], None]:
        """Turns what a watch hears into lines of the job's log, at most ten a second besides the nodes themselves."""
        known = {node_id: self._durations.node_s(node["class_type"]) for node_id, node in graph.items()}
        weights = {node_id: known[node_id] or _guess_s(node) for node_id, node in graph.items()}
        last_at = 0.0
        last_node: str | None = None
        expected = False

        def tell(watch: PromptWatch) -> None:
            nonlocal last_at, last_node, expected
            if not expected:
                expected = True
                self._stages.expect_outputs(job.folder, graph)
            # A node that may be at it for long is told at once: it may well say nothing more until it ends.
            seconds = known.get(watch.node or "")
            is_long = watch.node != last_node and (seconds is None or seconds >= _PROGRESS_EVERY_S)
            if job.status is not RunStatus.GENERATING:
                return
            if not is_long and watch.last_heard - last_at < _PROGRESS_EVERY_S:
                return
            last_at, last_node = watch.last_heard, watch.node
            value, maximum = watch.step or (None, None)
            job.events.add(
                self._clock.now(),
                RunStatus.GENERATING,
                f"Generating: {_title(graph, watch.node)}.",
                progress=watch.progress(weights),
                node=watch.node,
                step=None if value is None else int(value),
                steps=None if maximum is None else int(maximum),
            )

        return tell

    def _learn(self, job: Job, graph: Graph, watch: PromptWatch, entry: HistoryEntry, slot: EngineSlot) -> None:
        if answer.was_reused(entry):
            return
        needed = frozenset(models_of(graph))
        job.loaded = not needed <= slot.warm
        # The embedded engine says what is in its memory; of a ComfyUI it is known what it computed with last.
        resident = entry.meta.get("resident_models")
        slot.warm = frozenset(map(str, resident)) if isinstance(resident, list) else needed
        start, end = entry.message("execution_start"), entry.message("execution_success")
        if start and end:
            job.engine_s = max(0.0, (end["timestamp"] - start["timestamp"]) / 1000)
            self._durations.learn_run(job.shape, job.engine_s)
        for node_id, seconds in watch.node_seconds.items():
            if node_id in graph:
                self._durations.learn_node(graph[node_id]["class_type"], seconds)


class _RunFailed(Exception):
    """A run that failed for good, with the history that tells it."""

    def __init__(self, error: FleetError, entry: HistoryEntry | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.entry = entry


def _submitting(graph: Graph) -> Callable[..., Awaitable[RunEnd]]:
    async def start(slot: EngineSlot, watch: PromptWatch, *, clock: Clock) -> RunEnd:
        return await execute(slot, graph, watch, clock=clock)

    return start


def _error_of(fault: Fault) -> FleetError:
    if fault.kind is FaultKind.DISK_FULL:
        return DiskFull("no room for outputs on the worker's disk", **fault.details)
    return JobFailed(fault.message, fault=fault.kind.value, fault_class=fault.fault_class.value, **fault.details)


def _first_fleet_error(problem: BaseException) -> FleetError | None:
    if isinstance(problem, FleetError):
        return problem
    if isinstance(problem, BaseExceptionGroup):
        for inner in problem.exceptions:
            found = _first_fleet_error(inner)
            if found is not None:
                return found
    return None


def _guess_s(node: dict[str, Any]) -> float:
    """The weight of a node never seen: a sampler's steps, else one."""
    steps = node["inputs"].get("steps")
    return float(steps) if isinstance(steps, int) and 0 < steps <= 10_000 else 1.0


def _title(graph: Graph, node_id: str | None) -> str:
    node = graph.get(node_id or "")
    if node is None:
        return "starting"
    title = (node.get("_meta") or {}).get("title")
    return str(title or node["class_type"])

"""One accepted job: what was asked, how far it is, and what became of it. Plain state; the pipeline moves it.

Its status changes by `advance` only, along `wire.jobs.RUN_TRANSITIONS`. Its events are one log behind poll, stream and
webhook: numbered from 1, kept with the job, replayed from any number.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec

from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.jobs import RUN_FINAL, RUN_TRANSITIONS, RunStatus, advance
from comfyfleet.worker.engines.faults import FaultKind
from comfyfleet.worker.engines.watch import PromptWatch
from comfyfleet.worker.stages.input_store import InputFile

MAX_EVENTS = 1000
MESSAGES = {
    RunStatus.QUEUED: "Waiting in the queue.",
    RunStatus.PROCESSING: "Preparing inputs.",
    RunStatus.GENERATING: "Generating.",
    RunStatus.GENERATED: "Storing outputs.",
    RunStatus.COMPLETED: "Processing complete.",
    RunStatus.FAILED: "Processing failed.",
    RunStatus.CANCELLED: "Cancelled.",
}


class RunEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's log. at: epoch s. progress: percent of the whole job's nodes and steps."""

    number: int
    at: float
    status: RunStatus
    message: str
    progress: float | None = None
    node: str | None = None
    step: int | None = None
    steps: int | None = None


class EventLog:
    """Numbered events, bounded: progress in the middle is dropped first, never a change of status."""

    def __init__(self, first_number: int = 1) -> None:
        self.events: list[RunEvent] = []
        self._next = first_number
        self._grown: anyio.Event | None = None  # made by the first reader that waits
        self.closed = False

    def add(self, at: float, status: RunStatus, message: str, **facts: Any) -> RunEvent:
        event = RunEvent(number=self._next, at=at, status=status, message=message, **facts)
        self._next += 1
        self.events.append(event)
        if len(self.events) > MAX_EVENTS:
            oldest = next((one for one in self.events if one.progress is not None), self.events[0])
            self.events.remove(oldest)
        self._wake()
        return event

    def close(self) -> None:
        """The last event was added."""
        self.closed = True
        self._wake()

    async def follow(self, after: int = 0) -> AsyncIterator[RunEvent]:
        """Events numbered above `after`: those that are there, then those to come, until the log is closed."""
        while not self.is_read(after):
            for event in await self.more(after):
                after = event.number
                yield event

    async def more(self, after: int, at_most_s: float = math.inf) -> list[RunEvent]:
        """Events numbered above `after`; waits for the first of them, the end or `at_most_s`."""
        if not self.closed and not self._has_more(after):
            self._grown = self._grown or anyio.Event()
            with anyio.move_on_after(at_most_s):
                await self._grown.wait()
        return [one for one in self.events if one.number > after]

    def is_read(self, after: int) -> bool:
        """The log is closed, and nothing is numbered above `after`."""
        return self.closed and not self._has_more(after)

    def _has_more(self, after: int) -> bool:
        return bool(self.events) and self.events[-1].number > after

    def _wake(self) -> None:
        if self._grown is not None:
            self._grown.set()
            self._grown = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A job's end. `body` is the encoded result, as it is answered and kept."""

    status: RunStatus
    http_status: int
    body: bytes
    retry_after_s: float | None = None


@dataclass(kw_only=True, eq=False)
class Job:
    """Mutable on purpose, owned by the service; only the pipeline's task of this job changes it."""

    id: str
    scope: str
    key: str  # within the scope: the caller's request_id, else what the agent gave, else the id
    folder: str  # of its outputs, under the output folder
    request: GenerateInput
    fingerprint: str
    accepted_at: float
    prompt_id: str
    shape: str = ""
    status: RunStatus = RunStatus.QUEUED
    earlier_faults: tuple[FaultKind, ...] = ()
    fault: FaultKind | None = None
    engine: str = ""
    cached_nodes: tuple[str, ...] = ()
    engine_s: float | None = None  # from the engine's start of the prompt to its success; None where it came from cache
    loaded: bool = False  # its models were not in the engine's memory before
    stamps: dict[str, float] = field(default_factory=dict)
    events: EventLog = field(default_factory=EventLog)
    inputs: tuple[InputFile, ...] = ()
    watch: PromptWatch | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    finished: Finished | None = None
    followers: list[Callable[[Job], None]] = field(default_factory=list)  # told of the end by the service
    scope_of_run: anyio.CancelScope | None = None  # while its task is at it
    stopped_by: FleetError | None = None
    callers: int = 0  # connections that wait for the end
    abandonable: bool = True  # nobody but those callers wants it
    left_at: float | None = None  # when the last of them hung up

    @property
    def is_final(self) -> bool:
        return self.status in RUN_FINAL

    def advance(self, wanted: RunStatus, now: float, message: str = "") -> None:
        """The one way to another status."""
        self.status = advance(RUN_TRANSITIONS, self.status, wanted)
        self.stamps[wanted.value] = now
        self.events.add(now, wanted, message or MESSAGES[wanted])

    @property
    def last_word(self) -> str:
        return self.events.events[-1].message if self.events.events else ""

    def when_ended(self, tell: Callable[[Job], None]) -> None:
        """Call `tell` at the end, after those who wait for the answer have it; at once for a finished job."""
        if self.finished is None:
            self.followers.append(tell)
        else:
            tell(self)

    def stop(self, reason: FleetError) -> None:
        """Ask the run to end with `reason`; the first reason stays."""
        if self.stopped_by is None and self.finished is None:
            self.stopped_by = reason
            if self.scope_of_run is not None:
                self.scope_of_run.cancel()

    def deadline_at(self) -> float | None:
        return self.accepted_at + self.request.deadline_s if self.request.deadline_s > 0 else None

    def queue_deadline_at(self) -> float | None:
        waits = self.status in (RunStatus.QUEUED, RunStatus.PROCESSING)
        limit = self.request.max_queue_wait_s
        return self.accepted_at + limit if waits and limit > 0 else None

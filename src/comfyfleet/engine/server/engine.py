"""The engine behind the routes: takes prompts from the queue in order, has them rendered, tells and remembers.

The next prompt starts when the one before has nothing left to sample (`lanes`), so decoding and saving cost the sampler
no time. The engine outlives its render process. When that dies the prompts it had in hand fail and say why, the next
one goes to a fresh process, and what waits goes on waiting.
"""

from __future__ import annotations

import itertools
from typing import Any

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.engine import events
from comfyfleet.engine.registry import Declaration
from comfyfleet.engine.render.messages import CannotStart, Device, Done, Free, Ready, Report, Run, Stop, Told
from comfyfleet.engine.render.process import RenderLost, RenderProcess, started
from comfyfleet.engine.render.setup import RenderSettings
from comfyfleet.engine.server.lanes import Lanes, Running
from comfyfleet.engine.server.prompts import History, PromptQueue, PromptRecord, QueuedPrompt
from comfyfleet.engine.server.sockets import Hub
from comfyfleet.engine.server.telling import Teller
from comfyfleet.ids import Ids

log = structlog.get_logger()

LOST_TYPE = "comfyfleet.RenderProcessLost"
BUG_TYPE = "comfyfleet.EngineFailure"
RESTART_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # after children that never became ready


class _CannotStart(Exception):
    """A render process said so."""


class Engine:
    """Queue, history, sockets and the render process. Routes read and change it; `run` is its one loop."""

    def __init__(self, settings: RenderSettings, clock: Clock, ids: Ids) -> None:
        self.settings = settings
        self.ids = ids
        self.folders = settings.folders(clock, ids)
        self.queue = PromptQueue()
        self.history = History()
        self.hub = Hub()
        self.ready = anyio.Event()
        self.declarations: dict[str, Declaration] = {}
        self.devices: list[Device] = []
        self.torch_version = ""
        self._clock = clock
        self._child: RenderProcess | None = None
        self._lanes = Lanes()
        self._numbers = itertools.count(1)
        self._to_free: Free | None = None
        self._tried_again: set[str] = set()

    # The loop

    async def run(self) -> str:
        """Keep a render process, give it prompts. Returns only where none can start: the reason."""
        pause_s = RESTART_PAUSE_S
        while True:
            try:
                async with started(self.settings) as child:
                    await self._serve(child)
            except _CannotStart as hopeless:
                if not self.ready.is_set():
                    return str(hopeless)
                log.error("render.cannot_start", reason=str(hopeless))
            except RenderLost as lost:
                log.error("render.lost", reason=lost.reason, exit_code=lost.exit_code)
            except Exception:
                log.exception("engine.loop_failed")
            if self._child is None:
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._child, pause_s = None, RESTART_PAUSE_S

    async def _serve(self, child: RenderProcess) -> None:
        reports = child.reports()
        ready = await anext(reports)
        if isinstance(ready, CannotStart):
            raise _CannotStart(ready.reason)
        if not isinstance(ready, Ready):
            raise RuntimeError(f"the render process spoke before it was ready: {type(ready).__name__}")
        self.declarations, self.devices = ready.declarations, ready.devices
        self.torch_version = ready.torch_version
        self._child = child
        self.ready.set()
        log.info("render.ready", pid=child.pid, nodes=len(self.declarations), torch=self.torch_version)
        problem: Exception | None = None
        async with anyio.create_task_group() as both:

            async def feed() -> None:
                nonlocal problem
                try:
                    await self._feed(child)
                except Exception as error:
                    problem = error
                    both.cancel_scope.cancel()

            both.start_soon(feed, name="feed render process")
            try:
                async for report in reports:
                    self._take_in(report)
            except Exception as error:
                problem = error
            both.cancel_scope.cancel()
        if problem is not None:
            self._lose(problem)
            raise problem

    async def _feed(self, child: RenderProcess) -> None:
        """For ever: give out prompts as soon as their time has come; free memory when nothing runs."""
        while True:
            idle = not self._lanes.all()
            if self._to_free is not None and idle:
                asked, self._to_free = self._to_free, None
                await child.tell(asked)
            elif self._to_free is None and self._lanes.is_open and (item := self.queue.take_now()) is not None:
                await self._start(child, item)
            else:
                await self.queue.until_arrival()

    async def _start(self, child: RenderProcess, item: QueuedPrompt) -> None:
        record = PromptRecord(item=item)
        running = Running(number=next(self._numbers), record=record, teller=Teller(self.hub, record))
        self._lanes.enter(running)
        self.tell_status()
        await child.tell(
            Run(
                number=running.number,
                prompt_id=item.prompt_id,
                graph=item.prompt,
                outputs=item.outputs,
                extra_pnginfo=item.extra_data.get("extra_pnginfo") or {},
                wants_previews=self.hub.is_listening(item.client_id),
            )
        )

    def _take_in(self, report: Report) -> None:
        """What the render process says of a run."""
        if isinstance(report, Done):
            self.devices = report.devices
            if (ended := self._lanes.leave(report.number)) is not None:
                self._finish(ended.record, report.outcome)
        elif isinstance(report, Told):
            if isinstance(report.event, events.SamplingEnded):
                self._lanes.sampled(report.number)
            elif (running := self._lanes.get(report.number)) is not None:
                running.teller.tell(report.event)
                return
        self.queue.stir()

    def _lose(self, problem: Exception) -> None:
        """The render process is gone, or a bug of ours ends it: no prompt may run for ever."""
        begun = [running for running in self._lanes.all() if running.record.messages]
        for running in self._lanes.all():
            self._lanes.leave(running.number)
            item = running.record.item
            if not isinstance(problem, RenderLost):
                failure = self._failed(running, BUG_TYPE, f"the engine failed: {problem!r}\n")
            elif running in begun or item.prompt_id in self._tried_again:
                failure = self._failed(running, LOST_TYPE, _loss(problem, running, begun))
            else:
                self._try_again(item)
                continue
            running.teller.tell(failure)
            self._finish(running.record, None)

    def _try_again(self, item: QueuedPrompt) -> None:
        """The process died before it began with this prompt, so it is not to blame: once more."""
        self._tried_again.add(item.prompt_id)
        self.queue.ended(item)
        self.queue.put(item)

    def _failed(self, running: Running, kind: str, message: str) -> events.RunFailed:
        node, item = running.teller.current_node, running.record.item
        return events.RunFailed(
            node_id=node or "",
            node_type=item.prompt[node]["class_type"] if node else "",
            executed=[],
            exception_message=message,
            exception_type=kind,
            traceback=[],
            current_inputs={},
            current_outputs=[],
            timestamp_ms=int(self._clock.now() * 1000),
        )

    def _finish(self, record: PromptRecord, outcome: events.RunOutcome | None) -> None:
        item = record.item
        entry = record.entry(
            outputs=outcome.outputs if outcome else {},
            success=outcome is not None and outcome.status == "success",
            miniature=outcome is not None and outcome.miniature,
            resident_models=outcome.resident_models if outcome else (),
        )
        self.history.add(item.prompt_id, entry)
        self._tried_again.discard(item.prompt_id)
        self.queue.ended(item)
        self.tell_status()
        if item.client_id is not None:
            self.hub.send("executing", {"node": None, "prompt_id": item.prompt_id}, item.client_id)

    # What routes ask

    def tell_status(self) -> None:
        self.hub.send("status", {"status": self.status()})

    def status(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining}}

    def current_node(self, client_id: str) -> str | None:
        """The node that runs now for this client; of two prompts, the one that was started last."""
        mine = [running for running in self._lanes.all() if running.record.item.client_id == client_id]
        return mine[-1].teller.current_node if mine else None

    async def interrupt(self, prompt_id: str | None) -> None:
        """Stop whatever runs, or only this prompt."""
        for running in self._lanes.all():
            if self._child is not None and prompt_id in (None, running.record.item.prompt_id):
                await self._child.tell(Stop(number=running.number))

    async def free(self, *, unload_models: bool, free_memory: bool) -> None:
        """Unload models, and drop results with `free_memory`: now, or after what runs now and before what waits."""
        if unload_models or free_memory:
            drop = free_memory or (self._to_free is not None and self._to_free.drop_results)
            self._to_free = Free(unload_models=True, drop_results=drop)
            self.queue.stir()


def _loss(lost: RenderLost, running: Running, begun: list[Running]) -> str:
    """What a prompt's client is told of the process's end; nobody can say which of two prompts caused it."""
    others = [other.record.item.prompt_id for other in begun if other is not running]
    beside = f" (it ended prompt {others[0]} too, which it had in hand beside this one)" if others else ""
    return f"{lost.reason}{beside}; the next prompt gets a fresh process\n"

"""The engine behind the routes: takes prompts from the queue one by one, has them rendered, tells and remembers.

It outlives its render process. When that dies the prompt it rendered fails and says why, the next one goes to a fresh
process, and what waits goes on waiting.
"""

from __future__ import annotations

from typing import Any

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.engine import events
from comfyfleet.engine.registry import Declaration
from comfyfleet.engine.render.messages import Device, Done, Free, Ready, Run, Stop, Told
from comfyfleet.engine.render.process import RenderLost, RenderProcess, started
from comfyfleet.engine.render.setup import RenderSettings
from comfyfleet.engine.server.prompts import History, PromptQueue, PromptRecord, QueuedPrompt
from comfyfleet.engine.server.sockets import Hub
from comfyfleet.engine.server.telling import Teller
from comfyfleet.ids import Ids

log = structlog.get_logger()

LOST_TYPE = "comfyfleet.RenderProcessLost"
BUG_TYPE = "comfyfleet.EngineFailure"
RESTART_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # after children that never became ready


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
        self._teller: Teller | None = None
        self._tried_again: set[str] = set()

    # The loop

    async def run(self) -> None:
        """For ever: keep a render process, give it prompts."""
        pause_s = RESTART_PAUSE_S
        while True:
            try:
                async with started(self.settings) as child:
                    await self._serve(child)
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
        if not isinstance(ready, Ready):
            raise RuntimeError(f"the render process spoke before it was ready: {type(ready).__name__}")
        self.declarations, self.devices = ready.declarations, ready.devices
        self.torch_version = ready.torch_version
        self._child = child
        self.ready.set()
        log.info("render.ready", pid=child.pid, nodes=len(self.declarations), torch=self.torch_version)
        while True:
            await self._render_next(child, reports)

    async def _render_next(self, child: RenderProcess, reports: Any) -> None:
        item = await self._take(child, reports)
        record = PromptRecord(item=item)
        teller = self._teller = Teller(self.hub, record)
        self.tell_status()
        outcome: events.RunOutcome | None = None
        try:
            await child.tell(
                Run(
                    prompt_id=item.prompt_id,
                    graph=item.prompt,
                    outputs=item.outputs,
                    extra_pnginfo=item.extra_data.get("extra_pnginfo") or {},
                    wants_previews=self.hub.is_listening(item.client_id),
                )
            )
            async for report in reports:
                if isinstance(report, Told):
                    teller.tell(report.event)
                elif isinstance(report, Done):
                    outcome, self.devices = report.outcome, report.devices
                    break
        except RenderLost as lost:
            if not record.messages and item.prompt_id not in self._tried_again:
                self._try_again(item)
                raise
            teller.tell(self._failed(item, teller, LOST_TYPE, f"{lost.reason}; the next prompt gets a fresh process\n"))
            self._finish(record, None)
            raise
        except Exception as error:
            # A bug of ours must not leave a prompt that runs for ever: it fails, and `run` starts afresh.
            teller.tell(self._failed(item, teller, BUG_TYPE, f"the engine failed: {error!r}\n"))
            self._finish(record, None)
            raise
        self._finish(record, outcome)

    def _try_again(self, item: QueuedPrompt) -> None:
        """The process died before it began with this prompt, so it is not to blame: once more."""
        self._tried_again.add(item.prompt_id)
        self.queue.running = None
        self.queue.put(item)

    async def _take(self, child: RenderProcess, reports: Any) -> QueuedPrompt:
        """The next prompt; raises RenderLost when the child dies while nothing runs."""
        taken: QueuedPrompt | None = None
        async with anyio.create_task_group() as waiting:

            async def watch() -> None:
                await child.exited()
                waiting.cancel_scope.cancel()

            waiting.start_soon(watch, name="watch render process")
            taken = await self.queue.take()
            waiting.cancel_scope.cancel()
        if taken is None:
            await anext(reports)  # says how it ended
            raise RuntimeError("the render process spoke although nothing runs")
        return taken

    def _failed(self, item: QueuedPrompt, teller: Teller, kind: str, message: str) -> events.RunFailed:
        node = teller.current_node
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
        self.queue.running = None
        self._teller = None
        self.tell_status()
        if item.client_id is not None:
            self.hub.send("executing", {"node": None, "prompt_id": item.prompt_id}, item.client_id)

    # What routes ask

    def tell_status(self) -> None:
        self.hub.send("status", {"status": self.status()})

    def status(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining}}

    def current_node(self, client_id: str) -> str | None:
        """The node that runs now, if this client's prompt does."""
        running = self.queue.running
        if running is None or running.client_id != client_id or self._teller is None:
            return None
        return self._teller.current_node

    async def interrupt(self, prompt_id: str | None) -> None:
        """Stop what runs, or only if it is this prompt."""
        running = self.queue.running
        if running is None or self._child is None or prompt_id not in (None, running.prompt_id):
            return
        await self._child.tell(Stop(prompt_id=running.prompt_id))

    async def free(self, *, unload_models: bool, free_memory: bool) -> None:
        """After what runs now: unload models, and drop results with `free_memory`."""
        if self._child is not None and (unload_models or free_memory):
            await self._child.tell(Free(unload_models=unload_models or free_memory, drop_results=free_memory))

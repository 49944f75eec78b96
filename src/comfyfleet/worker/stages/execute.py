"""Stage three: one prompt through one engine, to the end that its history tells.

The socket hints, the history decides. A prompt is *lost* only when it is absent from the queue, then from the history,
then from the queue again; an engine that does not answer is waited for, because a lost prompt costs a whole render.
"""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.engines.client import EngineClient, EngineGone, HistoryEntry
from comfyfleet.worker.engines.faults import Fault, FaultKind, from_error_message
from comfyfleet.worker.engines.pool import EngineSlot
from comfyfleet.worker.engines.watch import PromptWatch

log = structlog.get_logger()

POLL_S = 1.0
_SOCKET_S = 2.0
# The history may come a little after the event that announces the end. Another event says that it came; should that be
# lost, we ask all the same.
_STORED_S = 0.02
_LATE_HISTORY_S = (0.0, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a run ended: an entry without fault is a success; `fault` None and `entry` None never both."""

    entry: HistoryEntry | None = None
    fault: Fault | None = None


async def execute(slot: EngineSlot, graph: Graph, watch: PromptWatch, *, clock: Clock) -> RunEnd:
    """Submit and follow. Raises WorkflowRefused. A cancelled scope leaves the prompt to `withdraw`."""
    slot.watches[watch.prompt_id] = watch
    await slot.client.until_connected(_SOCKET_S)
    slot.client.listen(watch.prompt_id, watch.hear)
    watch.client_id = slot.client.client_id
    try:
        try:
            await slot.client.submit(graph, watch.prompt_id)
        except EngineGone as gone:
            # It may have arrived all the same: what the engine says later decides.
            log.info("engine.submit_failed", engine=slot.name, prompt=watch.prompt_id, error=str(gone))
        return await follow(slot, watch, clock=clock)
    finally:
        slot.watches.pop(watch.prompt_id, None)
        slot.client.forget(watch.prompt_id)


async def adopt(slot: EngineSlot, watch: PromptWatch, *, clock: Clock) -> RunEnd:
    """Follow a prompt that was submitted before this process began."""
    slot.watches[watch.prompt_id] = watch
    try:
        return await follow(slot, watch, clock=clock, first_poll_s=0.0)
    finally:
        slot.watches.pop(watch.prompt_id, None)


async def follow(slot: EngineSlot, watch: PromptWatch, *, clock: Clock, first_poll_s: float = POLL_S) -> RunEnd:
    """Wait for the end of a submitted prompt. An adopted one is asked for at once: it may have ended long ago."""
    poll_s = first_poll_s
    while True:
        if not watch.hint.is_set():
            with anyio.move_on_after(poll_s):
                await watch.hint.wait()
        poll_s = POLL_S
        if watch.lost is not None:
            return _lost(slot, watch)
        try:
            entry = await _late_history(slot.client, watch, clock)
            if entry is not None:
                return read_end(entry)
            if await is_lost(slot.client, watch.prompt_id):
                watch.lose(FaultKind.ENGINE_LOST)
                return _lost(slot, watch)
            if not slot.owned and watch.is_stalled(slot.client.client_id):
                # Our own engines' processes are watched (`engines.vitals`); of a foreign one we see only silence.
                watch.lose(FaultKind.WORKER_THREAD_DEAD)
                return _lost(slot, watch)
        except EngineGone:
            # Its supervisor tells when the process is gone; a foreign engine may come back and still have it.
            if watch.lost is None:
                await clock.sleep(POLL_S / 4)


async def _late_history(client: EngineClient, watch: PromptWatch, clock: Clock) -> HistoryEntry | None:
    if not watch.hint.is_set():
        return await client.history(watch.prompt_id)
    if not watch.stored.is_set() and watch.lost is None:
        with anyio.move_on_after(_STORED_S):
            await watch.stored.wait()
    for wait_s in _LATE_HISTORY_S:
        if wait_s:
            await clock.sleep(wait_s)
        entry = await client.history(watch.prompt_id)
        if entry is not None or watch.lost is not None:
            return entry
    return None


async def is_lost(client: EngineClient, prompt_id: str) -> bool:
    """Absent from the queue, then the history, then the queue again. Raises EngineGone."""
    return (
        prompt_id not in await client.queue()
        and await client.history(prompt_id) is None
        and prompt_id not in await client.queue()
        and await client.history(prompt_id) is None
    )


async def withdraw(client: EngineClient, prompt_id: str) -> bool:
    """Take a prompt back, pending or running; True when the engine has it no more. Raises EngineGone."""
    await client.delete(prompt_id)
    await client.interrupt(prompt_id)
    return prompt_id not in await client.queue()


def read_end(entry: HistoryEntry) -> RunEnd:
    """The end that a history entry tells."""
    if entry.status.get("status_str") == "success":
        return RunEnd(entry=entry)
    error = entry.message("execution_error")
    if error is not None:
        return RunEnd(entry=entry, fault=from_error_message(error))
    interrupted = entry.message("execution_interrupted") or {}
    details = {"node_id": interrupted.get("node_id"), "class_type": interrupted.get("node_type")}
    fault = Fault(kind=FaultKind.INTERRUPTED, message="the run was interrupted in the engine", details=details)
    return RunEnd(entry=entry, fault=fault)


def _lost(slot: EngineSlot, watch: PromptWatch) -> RunEnd:
    kind = watch.lost or FaultKind.ENGINE_LOST
    details = {"engine": slot.name, "started": watch.started_at is not None, "node_id": watch.node}
    message = "the engine was lost while it had the job"
    if kind is FaultKind.WORKER_THREAD_DEAD:
        message = "the engine's worker thread died while it had the job"
    return RunEnd(fault=Fault(kind=kind, message=message, details=details))

"""Keeps each engine alive: start, canary, watch, restart with backoff; quarantine after the second device fault.

An engine of ours ends up in a new process when it exits, when its worker thread is dead, or when a fault asks for it.
A foreign one cannot be restarted: it is left alone until it answers and passes a canary again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.worker.engines import canary, process
from comfyfleet.worker.engines.client import EngineGone, wait_until_answering
from comfyfleet.worker.engines.faults import FaultKind
from comfyfleet.worker.engines.meeting import meet
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot, EngineState
from comfyfleet.worker.engines.process import EngineProcess
from comfyfleet.worker.engines.vitals import Vitals, is_worker_dead

log = structlog.get_logger()

DEVICE_FAULTS_ALLOWED = 1
START_TIMEOUT_S = 600.0
_WATCH_S = 1.0
_PROBE_S = 2.0
_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_LAST_WORDS_S = 0.5
_STEADY_S = 60.0  # a process that lived this long starts the backoff afresh


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start an engine of ours."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    log_path: Path


class _Ended(Exception):
    """The process must be replaced."""

    def __init__(self, kind: FaultKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Supervisor:
    """`tend` one engine for as long as the worker lives."""

    def __init__(self, pool: EnginePool, *, clock: Clock, ids: Ids) -> None:
        self._pool = pool
        self._clock = clock
        self._ids = ids

    async def tend(self, slot: EngineSlot, launch: Launch | None) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(slot.client.run)
            if launch is None:
                await self._tend_foreign(slot)
            else:
                await self._tend_own(slot, launch)

    async def _tend_own(self, slot: EngineSlot, launch: Launch) -> None:
        failures = 0
        while True:
            began = self._clock.monotonic()
            kind, reason = await self._one_life(slot, launch)
            if kind is FaultKind.DEVICE:
                slot.device_faults += 1
                if slot.device_faults > DEVICE_FAULTS_ALLOWED:
                    self._set(slot, EngineState.QUARANTINED, f"GPU quarantined after {slot.device_faults} faults")
                    return
            failures = 0 if self._clock.monotonic() - began > _STEADY_S else failures + 1
            slot.restarts += 1
            self._set(slot, EngineState.RESTARTING, reason)
            await self._clock.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] if failures else 0.0)

    async def _one_life(self, slot: EngineSlot, launch: Launch) -> tuple[FaultKind, str]:
        """Start a process and stay with it to its end; why it ended."""
        slot.restart_wanted, slot.restart_kind = anyio.Event(), None
        child = await process.start(launch.command, env=launch.env, cwd=launch.cwd, log_path=launch.log_path)
        ended: tuple[FaultKind, str] = (FaultKind.ENGINE_LOST, "stopped")
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child.read_log)
                tasks.start_soon(self._until_exit, child)
                tasks.start_soon(self._until_wanted, slot)
                await self._become_ready(slot, child)
                await self._watch_vitals(slot, child)
        except* _Ended as group:
            first = next(one for one in group.exceptions if isinstance(one, _Ended))
            ended = (first.kind, str(first))
        finally:
            self._set(slot, EngineState.RESTARTING, ended[1])
            await child.stop()
            slot.lose_prompts(ended[0] if ended[0] is FaultKind.WORKER_THREAD_DEAD else FaultKind.ENGINE_LOST)
        log.warning("engine.ended", engine=slot.name, kind=ended[0], reason=ended[1], last=child.last_lines[-3:])
        return ended

    async def _become_ready(self, slot: EngineSlot, child: EngineProcess) -> None:
        with anyio.move_on_after(START_TIMEOUT_S) as waiting:
            await wait_until_answering(slot.client, self._clock)
            reason = await canary.sing(slot.client, clock=self._clock, ids=self._ids)
            if reason is not None:
                await self._clock.sleep(_LAST_WORDS_S)  # one that is about to end says more
                raise _Ended(FaultKind.ENGINE_LOST, reason)
        if waiting.cancelled_caught:
            raise _Ended(FaultKind.ENGINE_LOST, f"no answer within {START_TIMEOUT_S:g} s")
        child.threads_at_ready = child.threads()
        await meet(slot)
        self._set(slot, EngineState.READY, "")

    async def _watch_vitals(self, slot: EngineSlot, child: EngineProcess) -> None:
        """Find a dead worker thread behind healthy HTTP (the rule: `vitals`)."""
        silent_since, cpu_then = self._clock.monotonic(), child.cpu_s()
        while True:
            await self._clock.sleep(_WATCH_S)
            now = self._clock.monotonic()
            if not slot.watches:
                silent_since, cpu_then = now, child.cpu_s()
                continue
            heard = max(watch.last_heard for watch in slot.watches.values())
            if heard > silent_since:
                silent_since, cpu_then = heard, child.cpu_s()
            vitals = Vitals(
                silent_s=now - silent_since,
                log_says_dead=child.worker_died.is_set(),
                log_says_thread_died=child.thread_died,
                lost_threads=len(child.threads_at_ready - child.threads()),
                cpu_share=(child.cpu_s() - cpu_then) / max(0.001, now - silent_since),
            )
            if is_worker_dead(vitals):
                raise _Ended(FaultKind.WORKER_THREAD_DEAD, "the engine's worker thread died")

    async def _until_exit(self, child: EngineProcess) -> None:
        code = await child.process.wait()
        with anyio.move_on_after(_LAST_WORDS_S):
            await child.log_ended.wait()
        words = child.last_words() if code else ""
        raise _Ended(
            FaultKind.ENGINE_LOST, f"the engine ended with code {code}" + (f": {words[:300]}" if words else "")
        )

    async def _until_wanted(self, slot: EngineSlot) -> None:
        await slot.restart_wanted.wait()
        kind = slot.restart_kind or FaultKind.ENGINE_LOST
        raise _Ended(kind, f"restarted after a fault ({kind})")

    async def _tend_foreign(self, slot: EngineSlot) -> None:
        while True:
            await wait_until_answering(slot.client, self._clock, poll_s=0.5)
            reason = await canary.sing(slot.client, clock=self._clock, ids=self._ids)
            if reason is not None:
                self._set(slot, EngineState.UNREACHABLE, reason)
                await self._clock.sleep(_PROBE_S)
                continue
            slot.restart_wanted, slot.restart_kind = anyio.Event(), None
            await meet(slot)
            self._set(slot, EngineState.READY, "")
            self._set(slot, EngineState.UNREACHABLE, await self._until_unwell(slot))

    async def _until_unwell(self, slot: EngineSlot) -> str:
        """Return why a foreign engine should get no work for now."""
        while True:
            with anyio.move_on_after(_PROBE_S):
                await slot.restart_wanted.wait()
                return f"fault: {slot.restart_kind}"
            try:
                with anyio.fail_after(10):
                    await slot.client.queue()
            except (EngineGone, TimeoutError) as gone:
                return str(gone) or "no answer"

    def _set(self, slot: EngineSlot, state: EngineState, reason: str) -> None:
        if (slot.state, slot.reason) == (state, reason):
            return
        slot.state, slot.reason = state, reason
        log.info("engine.state", engine=slot.name, state=state.value, reason=reason)
        self._pool.wake()

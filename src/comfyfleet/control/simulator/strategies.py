"""Who decides how many workers there are: ours, and the baselines it is held against.

A strategy is a function of the same `ScalingInputs` and returns actions. `knative` scales on concurrency as Knative's
autoscaler documents it: average concurrency over a 60 s window, over a target per worker; a 6 s panic window that
takes over at twice the capacity and never scales down; a scale-to-zero grace of 30 s.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

import msgspec

from comfyfleet.control.autoscaler import decide
from comfyfleet.control.scaling import Action, Decision, Memory, ScalingInputs, Verb
from comfyfleet.control.worker_states import ACTIVE, WorkerState


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, what to remember, and why."""

    actions: tuple[Action, ...]
    memory: Memory
    sentence: str = ""


class Strategy(Protocol):
    """Ours and each baseline."""

    def plan(self, inputs: ScalingInputs) -> Planned: ...


class OurAutoscaler:
    """The one of the control plane."""

    def plan(self, inputs: ScalingInputs) -> Planned:
        decision: Decision = decide(inputs)
        return Planned(actions=decision.actions, memory=decision.memory, sentence=decision.sentence)


class FixedFleet:
    """As many workers as told, always."""

    def __init__(self, count: int) -> None:
        self._count = count

    def plan(self, inputs: ScalingInputs) -> Planned:
        return Planned(actions=_towards(inputs, self._count), memory=inputs.memory)


class KnativeConcurrency:
    """Concurrency-target scaling. target: requests per worker."""

    STABLE_S, PANIC_S, PANIC_AT, GRACE_S = 60.0, 6.0, 2.0, 30.0

    def __init__(self, target: float, *, min_scale: int = 0) -> None:
        self._target = target
        self._min_scale = min_scale
        self._seen: deque[tuple[float, float]] = deque()
        self._panic_until = -1.0
        self._panic_count = 0
        self._busy_at = 0.0

    def plan(self, inputs: ScalingInputs) -> Planned:
        now = inputs.now
        concurrency = inputs.demand.waiting + sum(worker.backlog_jobs for worker in inputs.workers)
        self._seen.append((now, float(concurrency)))
        while self._seen[0][0] <= now - self.STABLE_S:
            self._seen.popleft()
        stable = sum(value for _, value in self._seen) / max(1, len(self._seen))
        recent = [value for at, value in self._seen if at > now - self.PANIC_S]
        active = sum(worker.state in ACTIVE for worker in inputs.workers)
        wanted = math.ceil(stable / self._target)
        by_panic = math.ceil(sum(recent) / len(recent) / self._target)
        if by_panic >= self.PANIC_AT * max(1, active):
            self._panic_until = now + self.STABLE_S
        if now < self._panic_until:
            self._panic_count = max(self._panic_count, by_panic, active)
            wanted = max(wanted, self._panic_count)
        else:
            self._panic_count = 0
        if concurrency:
            self._busy_at = now
        if wanted == 0 and now - self._busy_at < self.GRACE_S:
            wanted = min(1, active)
        return Planned(actions=_towards(inputs, max(wanted, self._min_scale)), memory=inputs.memory)


def _towards(inputs: ScalingInputs, wanted: int) -> tuple[Action, ...]:
    """Wake or create up to `wanted` active workers, or stop idle ones down to it."""
    wanted = min(wanted, inputs.policy.max_workers)
    active = [worker for worker in inputs.workers if worker.state in ACTIVE and not worker.intent]
    if len(active) < wanted:
        missing = wanted - len(active)
        stopped = [worker for worker in inputs.workers if worker.state is WorkerState.STOPPED][:missing]
        wake = [Action(verb=Verb.WAKE, group_id=1, worker_id=worker.id) for worker in stopped]
        return tuple(wake + [Action(verb=Verb.CREATE, group_id=1)] * (missing - len(wake)))
    idle = [worker for worker in active if worker.state is WorkerState.IDLE and not worker.is_leased]
    surplus = idle[: len(active) - wanted]
    return tuple(Action(verb=Verb.STOP, group_id=1, worker_id=worker.id) for worker in surplus)

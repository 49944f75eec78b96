"""Failing starts told apart from missing capacity, and a bound on paid time that leads to nothing. Pure.

A crash loop is a row of starts that failed, without one that led to a ready worker: each next start waits twice as
long. The breaker opens when starting workers has cost `boot_budget_s` of paid time without one becoming ready, whatever
is ready from before; an operator
closes it by changing the endpoint (or its workergroup), which is what a fix does anyway.
"""

from __future__ import annotations

import msgspec

from comfyfleet.control.scaling import Memory, ScalingInputs
from comfyfleet.control.worker_states import BOOTING, WorkerState

CRASH_LOOP_AFTER = 3
_PAUSE_FIRST_S = 15.0
_PAUSE_CAP_S = 900.0
NO_CAPACITY_PAUSE_S = 15.0
# Weight of the newest start in the learned starting times.
_LEARNING = 0.3


def after_boots(inputs: ScalingInputs) -> Memory:
    """The memory with the time since the last decision accounted for."""
    memory = inputs.memory
    # One that was ready before says nothing about what was started since.
    if any(worker.state is WorkerState.IDLE and worker.state_since >= memory.decided_at for worker in inputs.workers):
        return msgspec.structs.replace(memory, paid_boot_s=0.0, failed_starts=0, last_error="", breaker_since=0.0)
    since_s = max(0.0, inputs.now - memory.decided_at) if memory.decided_at else 0.0
    booting = sum(worker.state in BOOTING for worker in inputs.workers)
    paid_s = memory.paid_boot_s + booting * since_s
    is_open = bool(memory.breaker_since) or (inputs.boot_budget_s > 0 and paid_s > inputs.boot_budget_s)
    return msgspec.structs.replace(
        memory, paid_boot_s=paid_s, breaker_since=(memory.breaker_since or inputs.now) if is_open else 0.0
    )


def note_failed_start(memory: Memory, error: str, now: float) -> Memory:
    """A worker failed before it was ever ready in this start."""
    return msgspec.structs.replace(memory, failed_starts=memory.failed_starts + 1, failed_at=now, last_error=error)


def note_ready(memory: Memory, *, took_s: float, was_wake: bool) -> Memory:
    """A worker became ready `took_s` after it was started."""
    if was_wake:
        return msgspec.structs.replace(memory, wake_s=memory.wake_s * (1 - _LEARNING) + took_s * _LEARNING)
    return msgspec.structs.replace(memory, create_s=memory.create_s * (1 - _LEARNING) + took_s * _LEARNING)


def note_no_capacity(memory: Memory, why: str, now: float) -> Memory:
    """The provider had no place."""
    return msgspec.structs.replace(memory, no_capacity_until=now + NO_CAPACITY_PAUSE_S, no_capacity=why)


def forgiven(memory: Memory) -> Memory:
    """Somebody changed something: try again from the start."""
    return msgspec.structs.replace(
        memory, failed_starts=0, failed_at=0.0, paid_boot_s=0.0, breaker_since=0.0, no_capacity_until=0.0
    )


def pause_left_s(inputs: ScalingInputs) -> float:
    """How long a crash loop still waits before its next start."""
    row = inputs.memory.failed_starts - CRASH_LOOP_AFTER
    if row < 0:
        return 0.0
    pause_s = min(_PAUSE_CAP_S, _PAUSE_FIRST_S * 2.0 ** min(row, 10))
    return max(0.0, inputs.memory.failed_at + pause_s - inputs.now)


def may_start(inputs: ScalingInputs) -> bool:
    """A worker that exists may be started: neither the breaker nor a crash loop's pause forbids it."""
    return not inputs.memory.breaker_since and pause_left_s(inputs) <= 0


def start_refusal(inputs: ScalingInputs) -> str:
    """Why no new worker is created now, in words for an operator; "" when one may be."""
    memory = inputs.memory
    if memory.breaker_since:
        return (
            f"the spend breaker is open: {memory.paid_boot_s:.0f} s of paid starting time led to no ready worker"
            f"{_because(memory)}; change the endpoint or its workergroup to try again"
        )
    if (left_s := pause_left_s(inputs)) > 0:
        return (
            f"crash loop: {memory.failed_starts} starts in a row failed{_because(memory)}; "
            f"the next one comes in {left_s:.0f} s"
        )
    if memory.no_capacity_until > inputs.now:
        return f"no capacity: {memory.no_capacity}; the next try comes in {memory.no_capacity_until - inputs.now:.0f} s"
    return ""


def _because(memory: Memory) -> str:
    return f" ({memory.last_error})" if memory.last_error else ""

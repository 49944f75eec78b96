"""Is the engine's worker thread dead, or is it only in a long, silent node? Pure: signs in, a verdict out.

ComfyUI's one worker thread can die while HTTP answers on; then nothing ever runs again. A VAE decode is silent for most
of a minute and must never be mistaken for it. So silence alone proves nothing for an engine whose process we see:

- its log says that the prompt thread ended: dead, after a short silence;
- a thread that a healthy engine has is gone, and silent, and the process uses no processor: dead;
- otherwise alive.
For a foreign engine only silence is left: three times the learned duration of the node at work (`engines.learned`).
"""

from __future__ import annotations

from dataclasses import dataclass

_SURE_AFTER_S = 2.0
_LIKELY_AFTER_S = 8.0
_IDLE_CPU_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """silent_s: since the last event while a prompt is in the engine. cpu_share: of one core, over that silence."""

    silent_s: float
    log_says_dead: bool
    log_says_thread_died: bool
    lost_threads: int
    cpu_share: float


def is_worker_dead(vitals: Vitals) -> bool:
    """True only when the signs leave no doubt."""
    if vitals.log_says_dead:
        return vitals.silent_s >= _SURE_AFTER_S
    thread_is_gone = vitals.log_says_thread_died or vitals.lost_threads > 0
    return thread_is_gone and vitals.silent_s >= _LIKELY_AFTER_S and vitals.cpu_share < _IDLE_CPU_SHARE


def is_stalled(silent_s: float, limit_s: float) -> bool:
    """For an engine whose process we cannot see: silent beyond what its node ever needed."""
    return silent_s > limit_s

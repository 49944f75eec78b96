"""What to do after one attempt at a request: a decision over values, so that every case is a line in a test.

A request is safe to repeat: the same `request_idx` (and `input.request_id`, where given) joins the running job or
replays its answer, so a repeat never renders twice. What bounds repeats is the caller's `timeout` and `max_retries`,
and a wait that grows: a dead worker costs a handful of calls, not thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RETRYABLE_STATUSES = frozenset({408, 429, *range(500, 600)})
# "Not now" answers are retried for as long as the caller waits; other failures of a server a few times only.
PATIENT_STATUSES = frozenset({408, 429, 503})
DEFAULT_MAX_RETRIES = 5
FIRST_WAIT_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How one attempt ended. status None: no answer came (refused, reset, cut off)."""

    status: int | None
    retry_after_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """finish: hand this outcome to the caller. repeat: wait, then route again with the same request_idx."""

    action: Literal["finish", "repeat"]
    wait_s: float = 0.0


def next_step(
    attempt: Attempt,
    *,
    repeats_done: int,
    retry: bool,
    max_retries: int | None,
    max_wait_s: float,
    jitter: float,
) -> NextStep:
    """repeats_done: repeats so far. jitter: 0..1, drawn by the caller. max_retries None: our default bounds."""
    if attempt.status is not None and attempt.status not in RETRYABLE_STATUSES:
        return NextStep(action="finish")
    is_patient = attempt.status in PATIENT_STATUSES
    limit = max_retries if max_retries is not None else (None if is_patient else DEFAULT_MAX_RETRIES)
    if not retry or (limit is not None and repeats_done >= limit):
        return NextStep(action="finish")
    if attempt.retry_after_s is not None:
        return NextStep(action="repeat", wait_s=min(attempt.retry_after_s, 60.0))
    grown_s = min(FIRST_WAIT_S * 2.0 ** min(repeats_done, 16), max_wait_s)
    return NextStep(action="repeat", wait_s=grown_s * (0.5 + 0.5 * jitter))

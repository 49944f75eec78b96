"""Which worker gets a request: the one expected to finish it first. Pure; the simulator calls the same functions.

Expected finish = backlog ÷ score + own cost ÷ score + the time to load models that the request needs and the worker
does not have warm (where the request says which). Backlogs level out at equal *times*, so shares follow scores. A
worker whose expected queue is over the endpoint's `max_queue_time` is full: the request waits in the endpoint's queue
instead, where the next free worker finds it. The line is first in, first out; only where requests say which models
they need may one be overtaken, a bounded number of times, by one whose models are warm.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

import msgspec

from comfyfleet.control.load import WorkerLoad

Key = TypeVar("Key")

# How often a request may be overtaken by ones that need no model loaded, and how far back those are looked for.
MAX_BYPASSED = 20
LOOKAHEAD = 64


class Refusal(StrEnum):
    """Why no worker was chosen."""

    NO_WORKER = "no_worker"  # none is ready
    ALL_FULL = "all_full"
    ALL_EXCLUDED = "all_excluded"  # the ready ones have just failed this request


class Want(msgspec.Struct, frozen=True, gc=False):
    """What routing knows of a request. One is kept with every ticket (see `route_queue` for `gc=False`)."""

    cost: float
    models: frozenset[str] = frozenset()


def expected_queue_s(load: WorkerLoad, now: float) -> float:
    """Seconds until the worker would begin another request."""
    return load.backlog(now) / load.score


def expected_finish_s(load: WorkerLoad, want: Want, now: float) -> float:
    """Seconds until the worker would have finished the request."""
    finish_s = (load.backlog(now) + want.cost) / load.score
    if want.models and load.swap_s and not load.is_warm(want.models):
        finish_s += load.swap_s
    return finish_s


def choose(
    candidates: Iterable[tuple[Key, WorkerLoad]],
    want: Want,
    *,
    max_queue_time: float,
    excluded: frozenset[Key] | set[Key] = frozenset(),
    now: float,
) -> Key | Refusal:
    """The candidate that finishes first among those that are open and not full; the first one wins a tie.

    Candidates come in the order of preference between equals: least recently chosen first gives round robin.
    """
    best: Key | None = None
    best_finish_s = float("inf")
    open_count = 0
    excluded_count = 0
    for key, load in candidates:
        if not load.is_open or load.score <= 0:
            continue
        open_count += 1
        if key in excluded:
            excluded_count += 1
            continue
        backlog = load.backlog(now)
        if backlog > max_queue_time * load.score:
            continue
        finish_s = (backlog + want.cost) / load.score
        if want.models and load.swap_s and not load.is_warm(want.models):
            finish_s += load.swap_s
        if finish_s < best_finish_s:
            best, best_finish_s = key, finish_s
    if best is not None:
        return best
    if not open_count:
        return Refusal.NO_WORKER
    return Refusal.ALL_EXCLUDED if excluded_count == open_count else Refusal.ALL_FULL


def may_overtake(bypassed: int, want: Want, load: WorkerLoad) -> bool:
    """The chosen worker would have to load models for the request at the front, so another may go first there.

    Without this, a long line of mixed models makes every worker load a model for every job, and the line never gets
    shorter. A request is overtaken `MAX_BYPASSED` times at most, and only by requests that the worker is warm for.
    """
    return bypassed < MAX_BYPASSED and bool(want.models) and load.swap_s > 0 and not load.is_warm(want.models)


def is_overtaker(want: Want, load: WorkerLoad) -> bool:
    """This request is one that the worker is warm for."""
    return bool(want.models) and load.is_warm(want.models)

"""What a scaling decision is made of, and what it says: plain values, as JSON in the store, so it can be replayed.

`ScalingInputs` is everything `autoscaler.decide` reads; `Decision` is everything it returns, the memory for the next
time included. Loads are load units per second, work is in load units, times are epoch seconds.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from comfyfleet.control.demand import Demand
from comfyfleet.control.worker_states import WorkerState


class ScalePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint's parameters, by their public names (see `records.Endpoint` and docs/scaling.md)."""

    endpoint_id: int
    state: str = "active"
    min_load: float = 0.0
    target_util: float = 0.9
    cold_mult: float = 2.5
    min_cold_load: float = 0.0
    cold_workers: int = 5
    max_workers: int = 20
    max_queue_time: float = 30.0
    target_queue_time: float = 10.0
    inactivity_timeout: float | None = None


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A workergroup that may recruit. test_workers: how many are made at most while no score is known.

    perf: what its workers scored last, 0 where none ever did.
    """

    id: int
    generation: int = 0
    test_workers: int = 1
    perf: float = 0.0
    is_deleted: bool = False


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as scaling sees it. perf 0: not known yet. last_work_at: when it last had a request, 0 never."""

    id: int
    group_id: int
    state: WorkerState
    state_since: float
    created_at: float
    perf: float = 0.0
    is_leased: bool = False
    backlog: float = 0.0
    backlog_jobs: int = 0
    last_work_at: float = 0.0
    intent: str = ""
    failures: int = 0
    error: str = ""
    is_foreign: bool = False
    generation: int = 0
    price_hour: float = 0.0
    stage: str = ""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision leaves for the next one.

    over_since: since when there is more active capacity than wanted (0: there is not), and over_least: by how many
    workers at least in all that time. paid_boot_s: active time since a worker last became ready. failed_starts: in a
    row, of all workers. wake_s, create_s: how long starting takes here, as seen so far. breaker_since: when spending
    was stopped, 0 not.
    """

    decided_at: float = 0.0
    over_since: float = 0.0
    over_least: int = 0
    failed_starts: int = 0
    failed_at: float = 0.0
    last_error: str = ""
    paid_boot_s: float = 0.0
    breaker_since: float = 0.0
    no_capacity_until: float = 0.0
    no_capacity: str = ""
    wake_s: float = 20.0
    create_s: float = 60.0


class ScalingInputs(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a decision reads."""

    policy: ScalePolicy
    groups: tuple[GroupFacts, ...]
    demand: Demand
    workers: tuple[WorkerFacts, ...]
    memory: Memory
    now: float
    boot_budget_s: float = 3600.0


class Verb(StrEnum):
    """What the reconciler can be told to do."""

    CREATE = "create"
    WAKE = "wake"
    KEEP = "keep"  # take a drain back
    STOP = "stop"  # drains first
    DESTROY = "destroy"  # drains first
    REBOOT = "reboot"
    UPDATE = "update"  # drains first


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """worker_id 0: a new worker of group_id."""

    verb: Verb
    group_id: int
    worker_id: int = 0


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """sentence: what and why, for an operator. reason: why a request waits here and what comes next, for its caller."""

    actions: tuple[Action, ...]
    sentence: str
    reason: str
    predicted_load: float
    active_target: float
    total_target: float
    memory: Memory


def replay(inputs: str, outcome: str) -> tuple[Decision, Decision]:
    """(recorded, decided again) from what the store has; they are equal, or the code has changed."""
    from comfyfleet.control.autoscaler import decide

    return msgspec.json.decode(outcome, type=Decision), decide(msgspec.json.decode(inputs, type=ScalingInputs))

"""Facts for scaling decisions, with the usual values where a test does not care."""

from __future__ import annotations

from comfyfleet.control.demand import Demand, DemandRates
from comfyfleet.control.scaling import GroupFacts, Memory, ScalePolicy, ScalingInputs, WorkerFacts
from comfyfleet.control.worker_states import WorkerState

NOW = 1_000_000.0


def a_policy(**fields) -> ScalePolicy:
    return ScalePolicy(endpoint_id=1, **{"cold_workers": 0, "cold_mult": 1.0, **fields})


def a_worker(worker_id: int, state: WorkerState = WorkerState.IDLE, **fields) -> WorkerFacts:
    given = {"perf": 1.0, "last_work_at": NOW - 1000.0, "state_since": NOW - 1000.0, "created_at": NOW - 2000.0}
    return WorkerFacts(id=worker_id, group_id=1, state=state, **{**given, **fields})


def inputs(policy: ScalePolicy, *workers: WorkerFacts, waiting: int = 0, rate: float = 0.0, **fields) -> ScalingInputs:
    demand = Demand(
        waiting=waiting,
        waiting_cost=100.0 * waiting,
        rates=DemandRates(short=rate, middle=rate, long=rate, last_arrival_at=NOW - 1.0 if rate or waiting else 0.0),
    )
    given = {"groups": (GroupFacts(id=1, perf=1.0),), "memory": Memory(), "now": NOW, "demand": demand}
    return ScalingInputs(policy=policy, workers=workers, **{**given, **fields})


def verbs(decision) -> list[str]:
    return [str(action.verb) for action in decision.actions]

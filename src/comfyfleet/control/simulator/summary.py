"""A run in numbers: percentiles of waiting and latency, GPU-seconds by what they were spent on, swaps, money; and the
bound that nobody can beat.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from comfyfleet.control.simulator.files import FleetFile
from comfyfleet.control.simulator.simulation import Outcome, SimulatedDecision
from comfyfleet.control.simulator.trace import Arrival

PERCENTILES = (50, 90, 95, 99)


class TenantSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's share of a run."""

    requests: int
    wait_s: dict[str, float]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """wait_s: arrival to the beginning of work; latency_s: to its end. gpu_s: busy, swap, idle, booting, total.

    requests: those whose work began. tenants: by name, where the trace has more than one.
    """

    name: str
    requests: int
    unserved: int
    wait_s: dict[str, float]
    latency_s: dict[str, float]
    gpu_s: dict[str, float]
    swaps: int
    cost: float
    workers_created: int
    tenants: dict[str, TenantSummary] = {}
    decisions: tuple[SimulatedDecision, ...] = ()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95, p99, max, mean; nearest rank."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{p}": ordered[min(len(ordered) - 1, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES}
    return {**found, "max": ordered[-1], "mean": sum(ordered) / len(ordered)}


def summarise(name: str, outcome: Outcome, *, with_decisions: bool = False) -> Summary:
    gpu_s: dict[str, float] = {}
    cost = 0.0
    for machine in outcome.machines:
        for kind, seconds in machine.gpu_s.items():
            gpu_s[kind] = gpu_s.get(kind, 0.0) + seconds
        cost += sum(machine.gpu_s.values()) * machine.kind.price_hour / 3600.0
    gpu_s["total"] = sum(gpu_s.values())
    return Summary(
        name=name,
        requests=len(outcome.waits),
        unserved=outcome.left_waiting,
        wait_s=percentiles(outcome.waits),
        latency_s=percentiles(outcome.latencies),
        gpu_s=gpu_s,
        swaps=sum(machine.swaps for machine in outcome.machines),
        cost=cost,
        workers_created=len(outcome.machines),
        tenants=_by_tenant(outcome.waits_of) if len(outcome.waits_of) > 1 else {},
        decisions=tuple(outcome.decisions) if with_decisions else (),
    )


def _by_tenant(waits_of: Mapping[str, Sequence[float]]) -> dict[str, TenantSummary]:
    return {
        tenant: TenantSummary(requests=len(waits), wait_s=percentiles(waits))
        for tenant, waits in sorted(waits_of.items())
    }


def clairvoyant(arrivals: Iterable[Arrival], fleet: FleetFile) -> Summary:
    """A bound: each job on the fastest kind the moment it arrives, no idle second, one load per model, one start.

    No policy can use fewer GPU-seconds: every job's work has to be done, and every model has to be loaded once.
    """
    best = max(kind.score for kind in fleet.gpu)
    models = set()
    work = array("d")
    for arrival in arrivals:
        work.append(arrival.work_s / best)
        models.add(arrival.model)
    models.discard("")
    gpu_s = {
        "busy": sum(work),
        "swap": len(models) * min(kind.swap_s for kind in fleet.gpu),
        "idle": 0.0,
        "booting": min(kind.boot_s for kind in fleet.gpu) if work else 0.0,
    }
    gpu_s["total"] = sum(gpu_s.values())
    price_per_work = min(kind.price_hour / kind.score for kind in fleet.gpu)
    return Summary(
        name="clairvoyant bound",
        requests=len(work),
        unserved=0,
        wait_s=percentiles(array("d", bytes(8 * len(work)))),
        latency_s=percentiles(work),
        gpu_s=gpu_s,
        swaps=len(models),
        cost=sum(work) * best * price_per_work / 3600.0,
        workers_created=1 if work else 0,
    )

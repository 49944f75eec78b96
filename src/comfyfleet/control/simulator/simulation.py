"""The simulation: an event heap over arrivals, ends of jobs, ends of starts, and the autoscaler's ticks.

One endpoint, the same `FairShare` between tenants, the same `router.choose`, `DemandMeter` and `decide`. No asyncio and
no clock: virtual time is a number. It counts from the first arrival's second, whatever the trace counts from, so a
trace that is moved by whole seconds is the same trace; only what an `Outcome` tells is in the trace's time.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable

import msgspec

from comfyfleet.control import breaker
from comfyfleet.control.demand import Demand, DemandMeter
from comfyfleet.control.load import WorkerLoad
from comfyfleet.control.router import Want, choose, may_overtake
from comfyfleet.control.scaling import Action, GroupFacts, Memory, ScalePolicy, ScalingInputs, Verb
from comfyfleet.control.simulator.files import FleetFile
from comfyfleet.control.simulator.line import WaitingLine
from comfyfleet.control.simulator.machines import Job, Machine
from comfyfleet.control.simulator.strategies import Strategy
from comfyfleet.control.simulator.trace import Arrival
from comfyfleet.control.worker_states import WorkerState

TICK_S = 1.0
_END_JOB, _END_START = 0, 1
NO_MODELS: frozenset[str] = frozenset()


class SimulatedDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision that did something."""

    t_s: float
    sentence: str
    actions: tuple[Action, ...]


class Outcome(msgspec.Struct, kw_only=True):
    """Raw results: seconds of waiting and of latency per request, and what the machines cost.

    waits, waits_of: of those whose work began; waits_of has them by tenant.
    """

    waits: array[float]
    waits_of: defaultdict[str, array[float]]
    latencies: array[float]
    machines: list[Machine]
    decisions: list[SimulatedDecision]
    until_s: float
    left_waiting: int


class Simulation:
    """One run. affinity: the router knows which models a request needs."""

    def __init__(
        self,
        *,
        policy: ScalePolicy,
        fleet: FleetFile,
        strategy: Strategy,
        affinity: bool = True,
        tick_s: float = TICK_S,
        keeps_decisions: int = 10_000,
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._strategy = strategy
        self._affinity = affinity
        self._tick_s = tick_s
        self._keeps = keeps_decisions
        self._meter = DemandMeter()
        self._memory = Memory(wake_s=fleet.gpu[0].wake_s, create_s=fleet.gpu[0].boot_s)
        self._machines: dict[int, Machine] = {}
        self._gone: list[Machine] = []
        self._loads: dict[int, WorkerLoad] = {}
        self._line = WaitingLine()
        self._bypassed: dict[int, int] = {}
        self._events: list[tuple[float, int, int, int, int]] = []
        self._order = 0
        self._models: dict[str, frozenset[str]] = {}
        self._count = 0
        self._began_at = 0.0
        self.outcome = Outcome(
            waits=array("d"),
            waits_of=defaultdict(lambda: array("d")),
            latencies=array("d"),
            machines=[],
            decisions=[],
            until_s=0.0,
            left_waiting=0,
        )

    def run(self, arrivals: Iterable[Arrival], *, until_s: float | None = None) -> Outcome:
        """Until every request is done (or `until_s`)."""
        next_tick = 0.0
        now = 0.0
        for arrival in arrivals:
            if not self._count:
                self._began_at = float(math.floor(arrival.t_s))
            now = arrival.t_s - self._began_at
            next_tick = self._advance(now, next_tick)
            self._arrive(arrival, now)
        end = float("inf") if until_s is None else until_s - self._began_at
        # What is still in the system is brought to an end, ticking on; a fleet that cannot serve it gives up.
        give_up = now + 24 * 3600.0
        while (self._line.count or self._busy()) and next_tick <= min(end, give_up):
            now = next_tick
            next_tick = self._advance(next_tick, next_tick)
        for machine in self._machines.values():
            machine.account(now)
        self.outcome.machines = [*self._machines.values(), *self._gone]
        self.outcome.until_s = self._began_at + now
        self.outcome.left_waiting = self._line.count
        return self.outcome

    def _advance(self, until: float, next_tick: float) -> float:
        """Handle everything due before `until`, in order of time; returns the next tick's time."""
        events = self._events
        while True:
            due = events[0][0] if events else float("inf")
            if next_tick <= due and next_tick <= until:
                self._tick(next_tick)
                next_tick += self._tick_s
            elif due <= until:
                at, _, kind, worker_id, epoch = heapq.heappop(events)
                self._event(at, kind, worker_id, epoch)
            else:
                return next_tick

    def _busy(self) -> bool:
        return any(machine.job is not None for machine in self._machines.values())

    def _arrive(self, arrival: Arrival, now: float) -> None:
        self._count += 1
        self._meter.arrived(arrival.work_s, now)
        job = (self._count, now, arrival.work_s, arrival.model, arrival.tenant)
        chosen = None if self._line.count else self._choose(job, now)
        if chosen is None:
            self._line.add(job)
        else:
            self._start(chosen, job, now)

    def _serve(self, now: float) -> None:
        """Give those that wait, in turn, to workers, as long as there is room."""
        line = self._line
        while line.count:
            job = line.front()
            chosen = self._choose(job, now)
            if chosen is None:
                return
            job = self._overtaken(job, chosen)
            line.take(job)
            self._start(chosen, job, now)

    def _choose(self, job: Job, now: float) -> int | None:
        """The worker that the router chooses, which then comes last among equals."""
        want = Want(job[2], self._wanted(job[3]))
        chosen = choose(self._loads.items(), want, max_queue_time=self._policy.max_queue_time, now=now)
        if not isinstance(chosen, int):
            return None
        self._loads[chosen] = self._loads.pop(chosen)
        return chosen

    def _overtaken(self, job: Job, worker_id: int) -> Job:
        """The job, or one behind it that needs no model loaded there."""
        load = self._loads[worker_id]
        if not may_overtake(self._bypassed.get(job[0], 0), Want(job[2], self._wanted(job[3])), load):
            return job
        for other in self._line.behind(job):
            if load.is_warm(self._wanted(other[3])):
                self._bypassed[job[0]] = self._bypassed.get(job[0], 0) + 1
                return other
        return job

    def _start(self, worker_id: int, job: Job, now: float) -> None:
        machine = self._machines[worker_id]
        self._bypassed.pop(job[0], None)
        began = machine.give(job, self._wanted(job[3]), now)
        booking = machine.load.booking(job[0])
        assert booking is not None  # noqa: S101
        self._line.share.served(job[4], booking.work / machine.load.score)
        if began is not None:
            self._began(machine, began)

    def _wanted(self, model: str) -> frozenset[str]:
        if not model or not self._affinity:
            return NO_MODELS
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = frozenset({model})
        return known

    def _began(self, machine: Machine, at: float) -> None:
        assert machine.job is not None  # noqa: S101
        arrived = machine.job[1]
        self.outcome.waits.append(at - arrived)
        self.outcome.waits_of[machine.job[4]].append(at - arrived)
        self.outcome.latencies.append(machine.busy_until - arrived)
        self._push(machine.busy_until, _END_JOB, machine)

    def _push(self, at: float, kind: int, machine: Machine) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, kind, machine.id, machine.epoch))

    def _event(self, now: float, kind: int, worker_id: int, epoch: int) -> None:
        machine = self._machines.get(worker_id)
        if machine is None or machine.epoch != epoch:
            return
        if kind == _END_START:
            was_wake = machine.state is WorkerState.STARTING
            took_s = now - machine.state_since
            machine.to(WorkerState.IDLE, now)
            self._memory = breaker.note_ready(self._memory, took_s=took_s, was_wake=was_wake)
        else:
            began = machine.end_job(now)
            if began is not None:
                self._began(machine, began)
            elif machine.intent:
                self._release(machine, now)
        self._serve(now)

    def _tick(self, now: float) -> None:
        self._serve(now)
        inputs = ScalingInputs(
            policy=self._policy,
            groups=(GroupFacts(id=1, perf=self._fleet.gpu[0].score),),
            demand=Demand(
                waiting=self._line.count,
                waiting_cost=max(0.0, self._line.work) if self._line.count else 0.0,
                oldest_wait_s=now - self._line.oldest_at(now),
                rates=self._meter.rates(now),
            ),
            workers=tuple(machine.facts(now) for machine in self._machines.values()),
            memory=self._memory,
            now=now,
            boot_budget_s=0.0,
        )
        planned = self._strategy.plan(inputs)
        self._memory = planned.memory
        if planned.actions and len(self.outcome.decisions) < self._keeps:
            t_s = self._began_at + now
            decision = SimulatedDecision(t_s=t_s, sentence=planned.sentence, actions=planned.actions)
            self.outcome.decisions.append(decision)
        for action in planned.actions:
            self._act(action, now)

    def _act(self, action: Action, now: float) -> None:
        if action.verb is Verb.CREATE:
            self._create(now)
            return
        machine = self._machines[action.worker_id]
        if action.verb is Verb.WAKE and machine.state is WorkerState.STOPPED:
            machine.epoch += 1
            machine.to(WorkerState.STARTING, now)
            self._push(now + machine.kind.wake_s, _END_START, machine)
        elif action.verb is Verb.KEEP:
            machine.intent = ""
            machine.load.is_open = machine.state is WorkerState.IDLE
        elif action.verb in (Verb.STOP, Verb.DESTROY):
            machine.intent = str(action.verb)
            machine.load.is_open = False
            if machine.job is None:
                self._release(machine, now)

    def _create(self, now: float) -> None:
        counts: dict[str, int] = {}
        for machine in self._machines.values():
            counts[machine.kind.name] = counts.get(machine.kind.name, 0) + 1
        kind = next((kind for kind in self._fleet.gpu if counts.get(kind.name, 0) < kind.count), None)
        if kind is None:
            self._memory = breaker.note_no_capacity(self._memory, "every GPU of the fleet file is in use", now)
            return
        self._order += 1
        machine = Machine(self._order, kind, now)
        machine.working_since = now
        self._machines[machine.id] = machine
        self._loads[machine.id] = machine.load
        self._push(now + kind.boot_s, _END_START, machine)

    def _release(self, machine: Machine, now: float) -> None:
        """A drained machine stops, or goes."""
        machine.epoch += 1
        if machine.intent == "destroy":
            machine.to(WorkerState.DESTROYING, now)
            self._gone.append(self._machines.pop(machine.id))
            del self._loads[machine.id]
        else:
            machine.intent = ""
            machine.to(WorkerState.STOPPED, now)

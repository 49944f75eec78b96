"""How many workers, and which: one pure function of `ScalingInputs`. It never asks for a stop of a leased worker.

Growing is immediate: take back a drain, then wake inactive workers, then create; but a rate alone wakes nobody while
workers stand idle. Shrinking waits for a part of the time that starting a worker takes (one stopped too early costs a
start, one kept too long costs idle time). Failing starts are told apart from missing capacity, and paid time that
leads to no ready worker is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from comfyfleet.control.breaker import after_boots, may_start, start_refusal
from comfyfleet.control.scaling import Action, Decision, GroupFacts, Memory, ScalingInputs, Verb, WorkerFacts
from comfyfleet.control.scaling_frame import (
    Frame,
    cold_surplus,
    is_score_known,
    not_needed,
    price_per_perf,
    spare_active,
    typical_perf,
)
from comfyfleet.control.targets import (
    active_floor,
    active_target,
    is_quiet,
    predicted_load,
    queue_target,
    total_target,
    workers_for,
)
from comfyfleet.control.updates import called_off, update_actions
from comfyfleet.control.waiting_reasons import waiting_reason
from comfyfleet.control.worker_states import ACTIVE, BOOTING, WorkerState

# An inactive worker costs disk only, and waking it is quicker than making one: kept so long unused.
COLD_KEPT_S = 6 * 3600.0
# Restarted at most so often in a row, then replaced.
MAX_FAILURES = 3
# A failed worker that nobody misses is kept so long, for its logs.
UNNEEDED_S = 120.0
# Ready, or on the way without a download.
_SOON = frozenset(
    {WorkerState.IDLE, WorkerState.STARTING, WorkerState.UPDATE_READY, WorkerState.UPDATE_STARTING}
    | {WorkerState.UPDATE_REBOOTING}
)


def decide(inputs: ScalingInputs) -> Decision:
    """What to do now. Every number it used is in its result or in its inputs."""
    policy, workers, now = inputs.policy, inputs.workers, inputs.now
    memory = after_boots(inputs)
    inputs = msgspec.structs.replace(inputs, memory=memory)
    if policy.state == "suspended":
        return _nothing(inputs, "Suspended: nothing is started or stopped.")
    if policy.state in ("stopped", "destroyed"):
        return _wind_down(inputs)
    perf = typical_perf(inputs)
    service_s = inputs.demand.rates.mean_cost / perf
    has_work = inputs.demand.waiting > 0 or any(worker.is_leased for worker in workers)
    last_at = max([inputs.demand.rates.last_arrival_at, *(worker.last_work_at for worker in workers)])
    idle_s = 0.0 if has_work else now - last_at
    load = 0.0
    if not is_quiet(policy, idle_s=idle_s, wake_s=memory.wake_s):
        load = predicted_load(inputs.demand, service_s=service_s, lead_s=memory.wake_s)
    active = [worker for worker in workers if worker.state in ACTIVE and worker.intent not in ("stop", "destroy")]
    backlog = sum(worker.backlog for worker in active)
    by_rate = active_target(policy, load)
    serving = [worker for worker in active if worker.state not in BOOTING]
    ready = sum(worker.perf or perf for worker in serving)
    by_queue = queue_target(
        policy,
        inputs.demand,
        backlog=backlog,
        ready=ready,
        perf=perf,
        lead_s=memory.wake_s,
    )
    target = max(by_rate, by_queue)
    is_hard = by_queue > by_rate
    floor = active_floor(policy, active_now=len(active), idle_s=idle_s)
    if inputs.demand.waiting:
        floor = max(floor, 1)
    total = total_target(policy, active_target(policy, load))
    leased = sum(worker.perf or perf for worker in serving if worker.is_leased)
    is_stretched = leased >= policy.target_util * ready - 1e-9
    frame = Frame(
        inputs=inputs,
        perf=perf,
        target=target,
        urgent=target if is_stretched else max(by_queue, active_target(policy, 0.0)),
        floor=floor,
        total=total,
        active=tuple(active),
    )
    actions, why = _steps(frame, is_hard=is_hard)
    memory = _remember(frame, stopped=sum(action.verb is Verb.STOP for action in actions))
    return Decision(
        actions=tuple(actions),
        sentence=_sentence(frame, actions, why, load),
        reason=waiting_reason(inputs, actions),
        predicted_load=load,
        active_target=target,
        total_target=total,
        memory=memory,
    )


def _steps(frame: Frame, *, is_hard: bool) -> tuple[list[Action], str]:
    """The first of these that has something to do: repair, update, cap, grow, fill the cold pool, shrink."""
    inputs = frame.inputs
    if leftovers := _of_deleted_groups(inputs):
        return leftovers, "their workergroup is deleted"
    if kept := [worker for worker in inputs.workers if worker.is_foreign and worker.intent == "stop"]:
        return [Action(verb=Verb.KEEP, group_id=worker.group_id, worker_id=worker.id) for worker in kept], "it is back"
    if repairs := _repairs(frame):
        return repairs, "it failed"
    if kept_as_they_are := called_off(inputs):
        return kept_as_they_are, "the update is called off"
    if updates := update_actions(inputs):
        return updates, "a newer version of the workergroup is rolled out"
    if surplus := _over_cap(frame):
        return surplus, f"max_workers is {inputs.policy.max_workers}"
    if woken := _wake_meanwhile(frame):
        return woken, f"{_requests(inputs.demand.waiting)}, and it is ready sooner than what is being made"
    if not frame.suffices(frame.active):
        why = "the queue is over target_queue_time" if is_hard else "expected load asks for it"
        if not frame.active and inputs.demand.waiting:
            why = f"{_requests(inputs.demand.waiting)} and no worker is active"
        return _grow(frame), why
    if cold := _fill_cold(frame):
        return cold, "the cold pool is below its floor"
    return _shrink(frame)


def _of_deleted_groups(inputs: ScalingInputs) -> list[Action]:
    deleted = {group.id for group in inputs.groups if group.is_deleted}
    return [
        Action(verb=Verb.DESTROY, group_id=worker.group_id, worker_id=worker.id)
        for worker in inputs.workers
        if worker.group_id in deleted and worker.intent != "destroy" and worker.state is not WorkerState.DESTROYING
    ]


def _repairs(frame: Frame) -> list[Action]:
    """A failed worker that is needed is restarted after a pause, at most twice in a row; others are let go."""
    inputs = frame.inputs
    actions = []
    for worker in inputs.workers:
        if worker.state is not WorkerState.ERROR or worker.is_foreign or worker.is_leased or worker.intent:
            continue
        is_needed = not frame.suffices(frame.active) or len(inputs.workers) <= inputs.policy.cold_workers
        if worker.failures >= MAX_FAILURES or (not is_needed and inputs.now - worker.state_since > UNNEEDED_S):
            actions.append(Action(verb=Verb.DESTROY, group_id=worker.group_id, worker_id=worker.id))
        elif is_needed and inputs.now - worker.state_since >= _pause_s(worker.failures) and may_start(inputs):
            actions.append(Action(verb=Verb.REBOOT, group_id=worker.group_id, worker_id=worker.id))
    return actions


def _pause_s(failures: int) -> float:
    """0 failures: it lost its machine, which is no fault of its own."""
    return 2.0 * 2**failures if failures else 0.0


def _over_cap(frame: Frame) -> list[Action]:
    """More workers than max_workers: inactive ones go first, then those that start, then idle ones, worst first."""
    ours = [worker for worker in frame.inputs.workers if worker.intent != "destroy" and not worker.is_foreign]
    count = len(ours) - frame.inputs.policy.max_workers
    if count <= 0:
        return []

    def worth(worker: WorkerFacts) -> tuple[bool, bool, bool, float]:
        is_active, is_booting = worker.state in ACTIVE, worker.state in BOOTING
        return is_active, not is_booting, worker.is_leased, -price_per_perf(frame, worker)

    order = sorted(ours, key=worth)
    return [Action(verb=Verb.DESTROY, group_id=worker.group_id, worker_id=worker.id) for worker in order[:count]]


def _wake_meanwhile(frame: Frame) -> list[Action]:
    """Somebody waits, and all that is active has hours of downloads before it, perhaps: wake one, if there is one.

    A worker that is made counts as capacity from the beginning, so nothing else would be started for the request.
    """
    inputs, memory = frame.inputs, frame.inputs.memory
    if not inputs.demand.waiting or not frame.active or not may_start(inputs):
        return []
    if any(worker.state in _SOON for worker in frame.active):
        return []
    left_s = [memory.create_s - (inputs.now - worker.created_at) for worker in frame.active]
    if any(0 < one < memory.wake_s for one in left_s):
        return []
    stopped = [worker for worker in inputs.workers if worker.state is WorkerState.STOPPED and not worker.intent]
    best = max(stopped, key=frame.score, default=None)
    return [Action(verb=Verb.WAKE, group_id=best.group_id, worker_id=best.id)] if best is not None else []


def _grow(frame: Frame) -> list[Action]:
    """Take back drains, wake, create, until the target is carried or the cap is reached."""
    inputs = frame.inputs
    active = list(frame.active)
    actions: list[Action] = []
    draining = [worker for worker in inputs.workers if worker.intent == "stop" and worker.state in ACTIVE]
    stopped = [worker for worker in inputs.workers if worker.state is WorkerState.STOPPED and not worker.intent]
    for worker, verb in [
        *((worker, Verb.KEEP) for worker in sorted(draining, key=frame.score, reverse=True)),
        *((worker, Verb.WAKE) for worker in sorted(stopped, key=frame.score, reverse=True)),
    ]:
        if frame.suffices(active):
            return actions
        if verb is Verb.WAKE and not may_start(inputs):
            continue
        actions.append(Action(verb=verb, group_id=worker.group_id, worker_id=worker.id))
        active.append(worker)
    group = _recruiting_group(inputs)
    if frame.suffices(active) or group is None or start_refusal(inputs):
        return actions
    missing = frame.urgent - sum(map(frame.score, active))
    wanted = max(workers_for(missing, frame.perf), frame.floor - len(active))
    if not is_score_known(inputs):
        # Nobody knows yet what a worker can do here: learn from a few first.
        wanted = min(wanted, max(0, max(1, group.test_workers) - len(active)))
    room = inputs.policy.max_workers - len(inputs.workers)
    actions.extend(Action(verb=Verb.CREATE, group_id=group.id) for _ in range(min(wanted, max(0, room))))
    return actions


def _fill_cold(frame: Frame) -> list[Action]:
    """Create what the total lacks: they start, are benchmarked, and become inactive."""
    inputs = frame.inputs
    group = _recruiting_group(inputs)
    living = [worker for worker in inputs.workers if worker.intent != "destroy"]
    room = inputs.policy.max_workers - len(inputs.workers)  # one that goes is there until it is gone
    if room <= 0 or group is None or start_refusal(inputs):
        return []
    by_count = inputs.policy.cold_workers - len(living)
    by_load = 0
    if is_score_known(inputs):
        by_load = workers_for(frame.total - sum(map(frame.score, living)), frame.perf)
    booting = sum(worker.state in BOOTING for worker in living)
    # One after another beyond the first: a pool is no emergency, and what boots may already be enough.
    wanted = min(max(by_count, by_load), room, max(0, max(1, group.test_workers) - booting))
    return [Action(verb=Verb.CREATE, group_id=group.id) for _ in range(wanted)]


def _shrink(frame: Frame) -> tuple[list[Action], str]:
    """Stop idle workers that are not needed, then let go of a cold pool that is far too big."""
    now = frame.inputs.now
    if stopped := not_needed(frame):
        actions = [Action(verb=Verb.STOP, group_id=worker.group_id, worker_id=worker.id) for worker in stopped]
        return actions, "active capacity is more than the load needs"
    unused = [worker for worker in cold_surplus(frame) if now - worker.state_since >= COLD_KEPT_S]
    if unused:
        destroy = Action(verb=Verb.DESTROY, group_id=unused[0].group_id, worker_id=unused[0].id)
        return [destroy], "it has not been needed for hours, and the cold pool is larger than it has to be"
    return [], ""


def _recruiting_group(inputs: ScalingInputs) -> GroupFacts | None:
    """The group with the fewest workers, the oldest of equals."""
    counts = {group.id: 0 for group in inputs.groups if not group.is_deleted}
    for worker in inputs.workers:
        if worker.group_id in counts:
            counts[worker.group_id] += 1
    best = min(counts, key=lambda group_id: (counts[group_id], group_id), default=None)
    return next((group for group in inputs.groups if group.id == best), None)


def _remember(frame: Frame, *, stopped: int) -> Memory:
    """The memory after this decision; where workers were stopped, the delay begins anew for what is left."""
    memory, now = frame.inputs.memory, frame.inputs.now
    spare = len(spare_active(frame)) - stopped
    if spare <= 0 or not frame.carries(frame.active):
        return msgspec.structs.replace(memory, decided_at=now, over_since=0.0, over_least=0)
    if stopped or not memory.over_since:
        return msgspec.structs.replace(memory, decided_at=now, over_since=now, over_least=spare)
    return msgspec.structs.replace(memory, decided_at=now, over_least=min(memory.over_least or spare, spare))


def _wind_down(inputs: ScalingInputs) -> Decision:
    """Stopped: everything becomes inactive. Destroyed: everything goes. Both drain first."""
    is_destroyed = inputs.policy.state == "destroyed"
    verb = Verb.DESTROY if is_destroyed else Verb.STOP
    actions = [
        Action(verb=verb, group_id=worker.group_id, worker_id=worker.id)
        for worker in inputs.workers
        if worker.intent not in ("destroy", str(verb)) and (is_destroyed or worker.state in ACTIVE)
    ]
    word = "being deleted" if is_destroyed else "stopped"
    sentence = f"The endpoint is {word}: {len(actions)} of {len(inputs.workers)} workers are drained and ended."
    return _nothing(inputs, sentence, actions)


def _nothing(inputs: ScalingInputs, sentence: str, actions: Sequence[Action] = ()) -> Decision:
    return Decision(
        actions=tuple(actions),
        sentence=sentence,
        reason=waiting_reason(inputs, actions),
        predicted_load=0.0,
        active_target=0.0,
        total_target=0.0,
        memory=msgspec.structs.replace(inputs.memory, decided_at=inputs.now, over_since=0.0, over_least=0),
    )


_VERBS = {
    Verb.CREATE: "Create",
    Verb.WAKE: "Wake",
    Verb.KEEP: "Keep",
    Verb.STOP: "Stop",
    Verb.DESTROY: "Destroy",
    Verb.REBOOT: "Restart",
    Verb.UPDATE: "Update",
}


def _sentence(frame: Frame, actions: Sequence[Action], why: str, load: float) -> str:
    capacity = sum(map(frame.score, frame.active))
    numbers = (
        f"{load:.3g} load/s expected, {capacity:.3g} load/s active in {len(frame.active)} workers, "
        f"{frame.target:.3g} wanted"
    )
    if not actions:
        refusal = start_refusal(frame.inputs) if not frame.suffices(frame.active) else ""
        return f"Nothing to do: {refusal or numbers}."
    parts = []
    for verb in dict.fromkeys(action.verb for action in actions):
        of_verb = [action for action in actions if action.verb is verb]
        known = [str(action.worker_id) for action in of_verb if action.worker_id]
        what = f"worker{'s' * (len(known) > 1)} {', '.join(known)}" if known else _counted(len(of_verb), "worker")
        parts.append(f"{_VERBS[verb]} {what}")
    return f"{'; '.join(parts)}: {why} ({numbers})."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _requests(count: int) -> str:
    return f"{_counted(count, 'request')} {'waits' if count == 1 else 'wait'}"

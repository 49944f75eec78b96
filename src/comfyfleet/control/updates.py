"""Rolling update of a workergroup, pure: which workers to update next so that no request fails.

A worker is outdated when it was last started under an older generation of its group. At most a quarter of the ready
workers (at least one) are in the middle of it at a time; a worker drains first and is restarted empty. Inactive ones
go first: they are started, update, and become inactive again when they are not needed. A version that does not start
goes no further than the first workers that tried it.
"""

from __future__ import annotations

from comfyfleet.control.scaling import Action, ScalingInputs, Verb, WorkerFacts
from comfyfleet.control.worker_states import WorkerState

_UPDATING = (WorkerState.UPDATE_READY, WorkerState.UPDATE_REBOOTING, WorkerState.UPDATE_STARTING)


def outdated(inputs: ScalingInputs) -> list[WorkerFacts]:
    """Workers of an older generation than their group's, those that are going away left out."""
    generation = {group.id: group.generation for group in inputs.groups}
    return [
        worker
        for worker in inputs.workers
        if worker.generation < generation.get(worker.group_id, 0) and worker.intent != "destroy"
    ]


def called_off(inputs: ScalingInputs) -> list[Action]:
    """Workers that drain for an update that is not wanted any more: back into routing."""
    wanted = {worker.id for worker in outdated(inputs)}
    return [
        Action(verb=Verb.KEEP, group_id=worker.group_id, worker_id=worker.id)
        for worker in inputs.workers
        if worker.intent == "update" and worker.id not in wanted
    ]


def update_actions(inputs: ScalingInputs) -> list[Action]:
    """The next workers to update; empty while enough of them are under way."""
    if inputs.memory.failed_starts:
        return []  # what was started last did not become ready: the others stay as they are until one does
    waiting = outdated(inputs)
    ready = sum(worker.state is WorkerState.IDLE for worker in inputs.workers)
    under_way = sum(worker.state in _UPDATING or worker.intent == "update" for worker in inputs.workers)
    room = max(1, ready // 4) - under_way
    if room <= 0:
        return []
    able = [
        worker
        for worker in waiting
        if worker.state in (WorkerState.IDLE, WorkerState.STOPPED) and not worker.intent and not worker.is_foreign
    ]
    # Inactive ones first: nobody misses them meanwhile. Then idle ones (nothing to drain), then busy ones.
    able.sort(key=lambda worker: (worker.state is not WorkerState.STOPPED, worker.is_leased, worker.id))
    return [Action(verb=Verb.UPDATE, group_id=worker.group_id, worker_id=worker.id) for worker in able[:room]]

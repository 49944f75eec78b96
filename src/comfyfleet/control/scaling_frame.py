"""What one scaling decision has worked out so far, and what of the fleet it could do without. Pure.

`autoscaler` makes one frame for each decision and takes its steps by it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from comfyfleet.control.scaling import ScalingInputs, WorkerFacts
from comfyfleet.control.worker_states import BOOTING, WorkerState

# An unknown score is taken for this until the first benchmark: 100 load units in 100 s.
DEFAULT_PERF = 1.0
# Surplus is kept for this part of what starting a worker takes (tuned on the simulator's traces).
IDLE_PER_WAKE = 0.5
MIN_DOWN_DELAY_S = 10.0
MAX_DOWN_DELAY_S = 300.0
# The cold pool must be this much too big before it shrinks.
COLD_SLACK = 1.3


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """What one decision has worked out so far. target, urgent and total are load/s, floor is workers.

    target: what is kept. urgent: what is started for; less than target while workers stand idle.
    """

    inputs: ScalingInputs
    perf: float
    target: float
    urgent: float
    floor: int
    total: float
    active: tuple[WorkerFacts, ...]

    def score(self, worker: WorkerFacts) -> float:
        return worker.perf or self.perf

    def carries(self, workers: Sequence[WorkerFacts]) -> bool:
        """These workers are enough to be active; without any one of them they might not be."""
        return len(workers) >= self.floor and sum(map(self.score, workers)) >= self.target - 1e-9

    def suffices(self, workers: Sequence[WorkerFacts]) -> bool:
        """With these workers active, none has to be started."""
        return len(workers) >= self.floor and sum(map(self.score, workers)) >= self.urgent - 1e-9

    @property
    def down_delay_s(self) -> float:
        return min(max(self.inputs.memory.wake_s * IDLE_PER_WAKE, MIN_DOWN_DELAY_S), MAX_DOWN_DELAY_S)


def typical_perf(inputs: ScalingInputs) -> float:
    """Median of the known scores; of earlier workers of the groups where there is none now."""
    known = [worker.perf for worker in inputs.workers if worker.perf > 0]
    known = known or [group.perf for group in inputs.groups if group.perf > 0]
    return statistics.median(known) if known else DEFAULT_PERF


def is_score_known(inputs: ScalingInputs) -> bool:
    return any(worker.perf for worker in inputs.workers) or any(group.perf for group in inputs.groups)


def not_needed(frame: Frame) -> list[WorkerFacts]:
    """Of the spare ones, those that never had work, straight after their benchmark; and at the end of the delay as
    many as were spare all through it: at a steady load another one is idle in each second."""
    memory, spare = frame.inputs.memory, spare_active(frame)
    unused = [worker for worker in spare if not worker.last_work_at]
    used = [worker for worker in spare if worker.last_work_at]
    if not memory.over_since or frame.inputs.now - memory.over_since < frame.down_delay_s:
        return unused
    return unused + used[: max(0, (memory.over_least or len(spare)) - len(unused))]


def spare_active(frame: Frame) -> list[WorkerFacts]:
    """Idle, unleased workers that the target does without; worst price for performance first.

    What is still starting carries nothing yet: nobody who is ready goes for it.
    """
    keep = [worker for worker in frame.active if worker.state not in BOOTING]
    spare = []
    for worker in sorted(frame.active, key=lambda worker: -price_per_perf(frame, worker)):
        if worker.state is not WorkerState.IDLE or worker.is_leased or worker.intent or worker.is_foreign:
            continue
        without = [other for other in keep if other.id != worker.id]
        if frame.carries(without):
            keep = without
            spare.append(worker)
    return spare


def cold_surplus(frame: Frame) -> list[WorkerFacts]:
    """Inactive workers beyond what cold_workers, cold_mult and min_cold_load ask for, with some slack."""
    living = [worker for worker in frame.inputs.workers if worker.intent != "destroy"]
    stopped = [worker for worker in living if worker.state is WorkerState.STOPPED and not worker.is_foreign]
    surplus = []
    total = sum(map(frame.score, living))
    count = len(living)
    for worker in sorted(stopped, key=lambda worker: -price_per_perf(frame, worker)):
        left = total - frame.score(worker)
        if count - 1 < frame.inputs.policy.cold_workers or left < frame.total * COLD_SLACK:
            continue
        surplus.append(worker)
        total, count = left, count - 1
    return surplus


def price_per_perf(frame: Frame, worker: WorkerFacts) -> float:
    """Money for work done; where nothing has a price, the slower worker is the dearer one."""
    return (worker.price_hour or 1.0) / frame.score(worker)

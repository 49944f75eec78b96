"""A simulated worker: runs what it is given, one job after another, and accounts for every second it costs."""

from __future__ import annotations

from collections import deque

from comfyfleet.control.load import Booking, WorkerLoad
from comfyfleet.control.scaling import WorkerFacts
from comfyfleet.control.simulator.files import GpuKind
from comfyfleet.control.worker_states import ACTIVE, WorkerState

Job = tuple[int, float, float, str, str]  # number, arrival time, work at score 1.0, model, tenant


class Machine:
    """One worker of a kind. `gpu_s` has seconds by what they were spent on."""

    __slots__ = (
        "busy_until", "created_at", "epoch", "gpu_s", "id", "intent", "job", "jobs", "kind", "load", "state",
        "state_since", "swaps", "warm", "working_since",
    )  # fmt: skip

    def __init__(self, worker_id: int, kind: GpuKind, now: float) -> None:
        self.id = worker_id
        self.kind = kind
        self.created_at = self.state_since = now
        self.state = WorkerState.MODEL_LOADING
        self.intent = ""
        self.epoch = 0  # grows with each start: an event of an earlier one is stale
        self.jobs: deque[Job] = deque()
        self.job: Job | None = None
        self.busy_until = 0.0
        self.working_since = 0.0
        self.warm: list[str] = []  # least recently used first
        self.load = WorkerLoad(swap_s=kind.swap_s)
        self.gpu_s = {"busy": 0.0, "swap": 0.0, "idle": 0.0, "booting": 0.0}
        self.swaps = 0

    def give(self, job: Job, models: frozenset[str], now: float) -> float | None:
        """Take a job; the time its work begins if that is at once, None if it waits here."""
        self.load.book(Booking(request_idx=job[0], cost=job[2], at=now, models=models))
        if self.job is not None:
            self.jobs.append(job)
            return None
        return self._begin(job, now)

    def end_job(self, now: float) -> float | None:
        """The running job is done; the time at which the work of the next one begins, None if there is none."""
        assert self.job is not None  # noqa: S101
        self.load.finish(self.job[0], now)
        self.job = None
        self.working_since = now
        return self._begin(self.jobs.popleft(), now) if self.jobs else None

    def to(self, state: WorkerState, now: float) -> None:
        """Next state; the time in the last one is accounted for."""
        self.account(now)
        self.state = state
        self.state_since = now
        self.working_since = now
        self.load.is_open = state is WorkerState.IDLE and not self.intent
        self.load.score = self.kind.score if state is WorkerState.IDLE else 0.0
        if state is WorkerState.STOPPED:
            self.warm.clear()
            self.load.warm = frozenset()

    def account(self, now: float) -> None:
        """Idle or booting time up to now (busy time is accounted for when a job begins)."""
        if self.state in ACTIVE and self.job is None:
            kind = "idle" if self.state is WorkerState.IDLE else "booting"
            self.gpu_s[kind] += now - self.working_since
        self.working_since = now

    def facts(self, now: float) -> WorkerFacts:
        """What the autoscaler sees."""
        return WorkerFacts(
            id=self.id,
            group_id=1,
            state=self.state,
            state_since=self.state_since,
            created_at=self.created_at,
            perf=self.kind.score if self.load.last_work_at or self.state is not WorkerState.MODEL_LOADING else 0.0,
            is_leased=self.job is not None,
            backlog=self.load.backlog(now) if self.job is not None else 0.0,
            backlog_jobs=self.load.count,
            last_work_at=self.load.last_work_at,
            intent=self.intent,
            price_hour=self.kind.price_hour,
        )

    def _begin(self, job: Job, now: float) -> float:
        if self.job is None and self.state is WorkerState.IDLE:
            self.gpu_s["idle"] += now - self.working_since
        swap_s = 0.0
        model = job[3]
        if model:
            if model in self.warm:
                self.warm.remove(model)
            else:
                swap_s = self.kind.swap_s
                self.swaps += 1
                del self.warm[: max(0, len(self.warm) + 1 - self.kind.warm_models)]
            self.warm.append(model)
            self.load.warm = frozenset(self.warm)
        work_s = job[2] / self.kind.score
        self.gpu_s["swap"] += swap_s
        self.gpu_s["busy"] += work_s
        self.job = job
        self.busy_until = now + swap_s + work_s
        return now + swap_s

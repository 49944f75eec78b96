"""What happens when a worker reports: state, load, learned cost and score move; the line is served; loops wake up.

Synchronous, in memory. The API parses, this acts, `worker.fold_report` decides.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.desk import Desk
from comfyfleet.control.learned_cost import LearnedCost
from comfyfleet.control.limits import Limits
from comfyfleet.control.placements import finished_entries
from comfyfleet.control.route_queue import RouteTicket
from comfyfleet.control.scores import Scores
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.control.workers import Workers
from comfyfleet.wire.workers import FinishedRequest, FinishedRequests, WorkerStatusReport

log = structlog.get_logger()


class KeyUse(msgspec.Struct, frozen=True, kw_only=True):
    """A key's request took a worker's GPU for so many seconds, until then."""

    worker: Worker
    scope: str
    seconds: float
    until: float


class Reports:
    """The two kinds of report. `kick` wakes the reconciler when a worker's state changed."""

    def __init__(
        self,
        *,
        workers: Workers,
        desk: Desk,
        scores: Scores,
        learned: LearnedCost,
        limits: Limits,
        clock: Clock,
        kick: Callable[[], None],
    ) -> None:
        self.used: Callable[[KeyUse], None] = lambda use: None  # the ledger listens here
        self._limits = limits
        self._workers = workers
        self._desk = desk
        self._scores = scores
        self._learned = learned
        self._clock = clock
        self._kick = kick

    def status(self, report: WorkerStatusReport) -> None:
        """Raises Unauthorized, Fenced; nothing has changed then."""
        folded = self._workers.report(report, self._clock.now())
        before, after = folded.before, folded.after
        if after.state is not before.state:
            log.info(
                "worker.state", worker=after.id, before=str(before.state), now=str(after.state), why=after.error_msg
            )
            if after.state is WorkerState.ERROR:
                self._desk.lost(after.id, [])
            self._kick()
        if after.measured_perf != before.measured_perf:
            self._judge(after.endpoint_id)
        self._desk.heard(folded, report.working_request_idxs)

    def finished(self, report: FinishedRequests) -> None:
        """Raises Unauthorized, Fenced; unknown tickets are ignored, repeats change nothing."""
        worker = self._workers.fenced(report.worker_id, report.mtoken, report.incarnation)
        for entry in finished_entries(report):
            # Not by its booking: that is gone when the worker's status, or the end of a durable job, came first.
            ticket = self._desk.queue.get(entry.request_idx)
            if ticket is not None and ticket.worker_id == worker.id and not ticket.is_accounted:
                ticket.is_accounted = True
                self._ran(worker, entry, ticket)
        self._desk.finished(worker, report)
        self._judge(worker.endpoint_id)

    def _ran(self, worker: Worker, entry: FinishedRequest, ticket: RouteTicket) -> None:
        """A request is over that was booked there: what its time says of the worker, of its shape, and of its key."""
        # A worker of ours says what its engine took, and 0 where the engine's cache answered.
        seconds = entry.seconds if entry.shape else entry.work_completed_at - entry.work_started_at
        if seconds <= 0 or entry.work_started_at <= 0 or entry.status == "Cancelled":
            return
        if not ticket.held:  # a durable job is accounted by who holds its lease
            now = self._clock.now()
            self._limits.used_seconds(ticket.scope, seconds, now)
            self.used(KeyUse(worker=worker, scope=ticket.scope, seconds=seconds, until=now))
        if not entry.success or entry.status != "Success":
            return
        shape = entry.shape or ticket.shape
        cost = (self._learned.cost(worker.endpoint_id, shape) if shape else None) or ticket.want.cost
        if not entry.loaded and cost > 0:
            self._scores.ran(worker, cost=cost, seconds=seconds)
        self._learned.learn(worker.endpoint_id, shape, seconds=seconds, score=worker.measured_perf, loaded=entry.loaded)

    def _judge(self, endpoint_id: int) -> None:
        """Compare same-GPU peers; put the corrected score and the flag on each worker."""
        now = self._clock.now()
        for verdict in self._scores.judge(self._workers.of_endpoint(endpoint_id)):
            worker = self._workers.get(verdict.worker_id)
            if worker is None or (worker.living_perf == verdict.living_perf and worker.flag == verdict.flag):
                continue
            if verdict.flag and not worker.flag:
                log.warning("worker.flagged", worker=worker.id, why=verdict.flag)
            self._workers.change(worker.id, now, living_perf=verdict.living_perf, flag=verdict.flag)

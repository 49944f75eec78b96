"""What happens when a worker reports: state, load, learned cost and score move; the line is served; loops wake up.

Synchronous, in memory. The API parses, this acts, `worker.fold_report` decides.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.desk import Desk
from comfyfleet.control.learned_cost import LearnedCost
from comfyfleet.control.placements import finished_entries
from comfyfleet.control.scores import Scores
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.control.workers import Workers
from comfyfleet.wire.workers import FinishedRequests, WorkerStatusReport

log = structlog.get_logger()


class Reports:
    """The two kinds of report. `kick` wakes the reconciler when a worker's state changed."""

    def __init__(
        self,
        *,
        workers: Workers,
        desk: Desk,
        scores: Scores,
        learned: LearnedCost,
        clock: Clock,
        kick: Callable[[], None],
    ) -> None:
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
        for result in report.results:
            self._learn(after.endpoint_id, after.id, result)
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
        load = self._workers.load(worker.id)
        for entry in finished_entries(report):
            booking = load.booking(entry.request_idx)
            seconds = entry.work_completed_at - entry.work_started_at
            ran = entry.success and entry.status == "Success" and entry.work_started_at > 0 and seconds > 0
            if booking is not None and ran and booking.cost > 0:
                self._scores.ran(worker, cost=booking.cost, seconds=seconds)
                ticket = self._desk.queue.get(entry.request_idx)
                if ticket is not None:
                    self._learned.learn(worker.endpoint_id, ticket.shape, seconds=seconds, score=worker.measured_perf)
        self._desk.finished(worker, report)
        self._judge(worker.endpoint_id)

    def _learn(self, endpoint_id: int, worker_id: int, result: dict[str, object]) -> None:
        worker = self._workers.get(worker_id)
        shape, seconds = result.get("shape"), result.get("seconds")
        if worker is not None and isinstance(shape, str) and isinstance(seconds, int | float):
            self._learned.learn(endpoint_id, shape, seconds=float(seconds), score=worker.measured_perf)

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

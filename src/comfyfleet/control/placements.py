"""What goes over the desk: a request for a worker, and the two answers it can get. Values, and how they are shown."""

from __future__ import annotations

import msgspec

from comfyfleet.control.route_queue import RouteTicket
from comfyfleet.control.worker import Worker
from comfyfleet.wire.routing import RouteReady, RouteWaiting
from comfyfleet.wire.workers import FinishedRequest, FinishedRequests


class TakeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request at the desk. held: a durable job, whose booking ends only by a report or `release`."""

    endpoint_id: int
    endpoint_name: str
    max_queue_time: float
    scope: str
    cost: float = 100.0
    request_idx: int = 0
    replay_timeout: float = 60.0
    models: frozenset[str] = frozenset()
    shape: str = ""
    held: bool = False
    excluded: frozenset[int] = frozenset()


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen worker and the answer to give."""

    worker_id: int
    answer: RouteReady


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """A place in the line. ticket.changed fires when there is news; not_before: no earlier answer (throttled).

    retry_after_s: how long the key's limits hold it back at least, 0 where they do not.
    """

    ticket: RouteTicket
    answer: RouteWaiting
    retry_after_s: float = 0.0


def finished_entries(report: FinishedRequests) -> list[FinishedRequest]:
    """Both forms of `/delete_requests/` as one."""
    status = "Success" if report.success else "Error"
    older = [FinishedRequest(request_idx=idx, success=report.success, status=status) for idx in report.request_idxs]
    return [*report.requests, *older]


def state_counts(workers: list[Worker]) -> str:
    """ "1 loading, 2 idle": the text that the documents show as `status`."""
    counts: dict[str, int] = {}
    for worker in workers:
        counts[str(worker.state)] = counts.get(str(worker.state), 0) + 1
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no workers"

"""The worker's load, kept as the reports need it: what runs now, and sums since the last delivered report.

Sums are taken by `draft` and only cleared by `delivered`, so a report that does not arrive loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from comfyfleet.wire.workers import FinishedRequest

MAX_UNREPORTED = 10_000


@dataclass(frozen=True, kw_only=True)
class LoadSums:
    """Load units since the last delivered report: received less cancelled, refused, finished."""

    new_load: float = 0.0
    rej_load: float = 0.0
    cur_perf: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a request's run was like. started_at: epoch s, when it left the worker's own queue; 0: it never did.

    seconds: the engine's, 0 where it did not say (its cache answered, or the answer was replayed). loaded: models had
    to be loaded first.
    """

    started_at: float
    seconds: float = 0.0
    shape: str = ""
    loaded: bool = False


@dataclass(kw_only=True)
class LoadBook:
    """Requests in flight by reqnum, and what the control plane has not been told yet."""

    _working: dict[int, tuple[int, float, float]] = field(default_factory=dict)  # reqnum -> (ticket, cost, began)
    _new: float = 0.0
    _rejected: float = 0.0
    _done: float = 0.0
    _received: int = 0
    _finished: list[FinishedRequest] = field(default_factory=list)

    @property
    def current_load(self) -> float:
        return sum(cost for _, cost, _ in self._working.values())

    @property
    def working(self) -> int:
        return len(self._working)

    @property
    def received(self) -> int:
        return self._received

    def working_request_idxs(self) -> tuple[int, ...]:
        """Tickets in flight, each once; sessions (ticket 0) are not requests."""
        return tuple(sorted({ticket for ticket, _, _ in self._working.values() if ticket}))

    def begin(self, *, reqnum: int, request_idx: int, cost: float, now: float) -> None:
        self._working[reqnum] = (request_idx, cost, now)
        self._received += 1
        self._new += cost

    def reject(self, *, request_idx: int, cost: float, now: float) -> None:
        """Refused before it began: routable again elsewhere."""
        self._rejected += cost
        self._tell(FinishedRequest(request_idx=request_idx, success=False, status="Rejected", entered_queue_at=now))

    def end(self, *, reqnum: int, status: str, now: float, run: RunFacts | None = None) -> None:
        """status: Success, Error or Cancelled. Unknown reqnums are ignored (ended before)."""
        entry = self._working.pop(reqnum, None)
        if entry is None:
            return
        request_idx, cost, began = entry
        if status == "Cancelled":
            self._new -= cost
        else:
            self._done += cost
        if request_idx:
            run = run or RunFacts(started_at=began)
            self._tell(
                FinishedRequest(
                    request_idx=request_idx,
                    success=status == "Success",
                    status=status,
                    entered_queue_at=began,
                    work_started_at=run.started_at,
                    work_completed_at=0.0 if status == "Cancelled" else now,
                    seconds=run.seconds,
                    shape=run.shape,
                    loaded=run.loaded,
                )
            )

    def draft(self) -> LoadSums:
        return LoadSums(new_load=self._new, rej_load=self._rejected, cur_perf=self._done)

    def delivered(self, sums: LoadSums) -> None:
        self._new -= sums.new_load
        self._rejected -= sums.rej_load
        self._done -= sums.cur_perf

    def unreported(self) -> tuple[FinishedRequest, ...]:
        return tuple(self._finished)

    def reported(self, requests: tuple[FinishedRequest, ...]) -> None:
        self._finished = self._finished[len(requests) :]

    def _tell(self, request: FinishedRequest) -> None:
        self._finished.append(request)
        # A control plane that stays away for hours learns the newest; older tickets have expired there anyway.
        del self._finished[:-MAX_UNREPORTED]

"""The live registry: every worker of every endpoint, with its load. In memory; the reconciler persists what changed.

One method per thing that can happen to a worker. Values change only by the pure functions of `worker` and
`worker_states`; the loads of `load` are opened and closed here, so that routing need not look at anything else.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable, Iterable, KeysView

import msgspec
from anyio.lowlevel import checkpoint

from comfyfleet.control.load import Booking, WorkerLoad
from comfyfleet.control.worker import SILENT_AFTER_S, Worker, fold_report, is_routable, listed, to_state
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.wire.errors import Fenced, NotFound, Unauthorized
from comfyfleet.wire.workers import WorkerStatusReport

QUARANTINE_FIRST_S = 10.0
QUARANTINE_CAP_S = 300.0
LOOKED_AT_ONCE = 100
# A doubted worker's score counts this much less (the documents: more than 20 % slower than its peers).
FLAGGED_SHARE = 0.75
# What loading another model into GPU memory costs until jobs have shown it: gigabytes at the speed of a disk.
SWAP_S = 15.0


class Folded(msgspec.Struct, frozen=True, kw_only=True):
    """What a report changed. adopted: requests the worker had that nobody here knew."""

    before: Worker
    after: Worker
    adopted: tuple[int, ...] = ()


class Workers:
    """Workers by id, and per endpoint the loads in the order in which routing should try equals."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}
        self._loads: dict[int, WorkerLoad] = {}
        self._by_endpoint: dict[int, dict[int, WorkerLoad]] = {}
        self.swap_s_of: Callable[[int], float | None] = lambda endpoint_id: None  # as learned from its jobs
        self._changed: set[int] = set()
        self._gone: set[int] = set()

    # --- reading -------------------------------------------------------------------------------------------------
    def get(self, worker_id: int) -> Worker | None:
        return self._workers.get(worker_id)

    def known(self, worker_id: int) -> Worker:
        """One that is there."""
        return self._workers[worker_id]

    def load(self, worker_id: int) -> WorkerLoad:
        return self._loads[worker_id]

    def all(self) -> list[Worker]:
        return list(self._workers.values())

    async def each(self) -> AsyncIterator[Worker]:
        """Every worker, with room between every few for whoever waits: ten thousand at once would hold up answers."""
        for count, worker_id in enumerate(list(self._workers), 1):
            worker = self._workers.get(worker_id)
            if worker is not None:
                yield worker
            if count % LOOKED_AT_ONCE == 0:
                await checkpoint()

    def of_endpoint(self, endpoint_id: int) -> list[Worker]:
        return [self._workers[worker_id] for worker_id in self._by_endpoint.get(endpoint_id, ())]

    def candidates(self, endpoint_id: int) -> Iterable[tuple[int, WorkerLoad]]:
        """Least recently chosen first."""
        return self._by_endpoint.get(endpoint_id, {}).items()

    def ids_of(self, endpoint_id: int) -> KeysView[int]:
        return self._by_endpoint.get(endpoint_id, {}).keys()

    def listing(self, endpoint_id: int) -> list[dict[str, object]]:
        """Rows of `/get_endpoint_workers/`, oldest worker first."""
        found = sorted(self.of_endpoint(endpoint_id), key=lambda worker: worker.id)
        return [listed(worker, self._loads[worker.id].count) for worker in found]

    def take_changes(self) -> tuple[list[Worker], list[int]]:
        """(changed, gone) since the last call: what to persist."""
        changed = [self._workers[worker_id] for worker_id in sorted(self._changed) if worker_id in self._workers]
        gone = sorted(self._gone)
        self._changed.clear()
        self._gone.clear()
        return changed, gone

    # --- writing -------------------------------------------------------------------------------------------------
    def add(self, worker: Worker, now: float, *, is_persisted: bool = False) -> None:
        self._workers[worker.id] = worker
        load = self._loads.setdefault(worker.id, WorkerLoad())
        # What one that was ready before we knew it did then is not known: it counts as needed at that time.
        load.last_work_at = max(load.last_work_at, worker.loaded_at)
        self._by_endpoint.setdefault(worker.endpoint_id, {}).setdefault(worker.id, load)
        if not is_persisted:
            self._changed.add(worker.id)
        self._refresh(worker, now)

    def put(self, worker: Worker, now: float) -> None:
        """Replace a worker's value; remembers it for the store when more than measurements changed."""
        before = self._workers[worker.id]
        self._workers[worker.id] = worker
        if lasting(before) != lasting(worker):
            self._changed.add(worker.id)
        self._refresh(worker, now)

    def move(self, worker_id: int, state: WorkerState, now: float) -> Worker:
        """Into another state, by the table."""
        moved = to_state(self._workers[worker_id], state, now)
        self.put(moved, now)
        return moved

    def fail(self, worker_id: int, why: str, now: float, *, is_own_fault: bool = True) -> Worker:
        """Into ERROR, saying why. What is not its own fault is no start that failed."""
        before = self._workers[worker_id]
        failed = to_state(msgspec.structs.replace(before, error_msg=why), WorkerState.ERROR, now)
        if not is_own_fault:
            failed = msgspec.structs.replace(failed, failures=before.failures)
        self.put(failed, now)
        return failed

    def change(self, worker_id: int, now: float, **fields: object) -> Worker:
        """Other fields than the state."""
        changed = msgspec.structs.replace(self._workers[worker_id], **fields)
        self.put(changed, now)
        return changed

    def remove(self, worker_id: int) -> list[int]:
        """Forget a worker; returns the requests it had."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return []
        lost = self._loads.pop(worker_id).clear()
        self._by_endpoint[worker.endpoint_id].pop(worker_id, None)
        self._gone.add(worker_id)
        self._changed.discard(worker_id)
        return lost

    def forget(self, endpoint_id: int) -> None:
        """An endpoint's workers are another control plane's to know; nothing is gone."""
        for worker_id in self._by_endpoint.pop(endpoint_id, {}):
            del self._workers[worker_id], self._loads[worker_id]
            self._changed.discard(worker_id)

    def unsaved(self, worker_id: int) -> None:
        """What `take_changes` gave could not be stored: give it again."""
        if worker_id in self._workers:
            self._changed.add(worker_id)

    def still_stored(self, worker_ids: Iterable[int]) -> None:
        """Workers that `take_changes` gave as gone, and that the store has yet."""
        self._gone |= set(worker_ids)

    def authenticate(self, worker_id: int, mtoken: str) -> Worker:
        """The worker, if this is its token. Raises Unauthorized: nothing has changed then."""
        return check_token(self._workers.get(worker_id), worker_id, mtoken)

    def fenced(self, worker_id: int, mtoken: str, incarnation: str) -> Worker:
        """The worker, if this is its token and its present life. Raises Unauthorized or Fenced: nothing has changed.

        Workers of other makes name no incarnation; theirs cannot be told apart.
        """
        worker = self.authenticate(worker_id, mtoken)
        if incarnation and worker.incarnation and incarnation != worker.incarnation and not worker.is_foreign:
            raise Fenced("this worker was started again elsewhere; this life of it is over", worker_id=worker_id)
        return worker

    def report(self, report: WorkerStatusReport, now: float) -> Folded:
        """Fold a worker's report in. Raises Unauthorized, Fenced."""
        before = self.fenced(report.id, report.mtoken, report.incarnation)
        after = fold_report(before, report, now)
        load = self._loads[report.id]
        adopted = load.reconcile(
            frozenset(report.working_request_idxs),
            cur_load=report.cur_load,
            working_count=report.num_requests_working,
            now=now,
        )
        load.warm = frozenset(after.warm_models or ())
        # Only a worker that says what it has warm can be asked to keep it.
        load.swap_s = 0.0 if after.warm_models is None else self.swap_s_of(after.endpoint_id) or SWAP_S
        self.put(after, now)
        return Folded(before=before, after=after, adopted=tuple(adopted))

    def book(self, worker_id: int, booking: Booking) -> None:
        """Book a request on a worker, which now comes last among equals."""
        worker = self._workers.get(worker_id)
        if worker is None:
            raise NotFound("the worker is gone", worker_id=worker_id)
        load = self._loads[worker_id]
        load.book(booking)
        order = self._by_endpoint[worker.endpoint_id]
        order[worker_id] = order.pop(worker_id)

    def suspect(self, worker_id: int, now: float) -> None:
        """Somebody could not reach it: out of routing until it reports again."""
        self.change(worker_id, now, is_suspect=True)

    def quarantine(self, worker_id: int, now: float) -> None:
        """Nobody could reach it: out of routing, longer each time in a row; `vouch` ends the row."""
        worker = self._workers[worker_id]
        if now < worker.quarantined_until:
            return
        for_s = min(QUARANTINE_CAP_S, QUARANTINE_FIRST_S * 2**worker.quarantines)
        self.change(worker_id, now, quarantined_until=now + for_s, quarantines=worker.quarantines + 1)

    def vouch(self, worker_id: int, now: float) -> None:
        """It finished a request: it can be reached."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.quarantines:
            self.change(worker_id, now, quarantined_until=0.0, quarantines=0)

    def look(self, worker: Worker, now: float) -> bool:
        """Close the load of a silent worker, open that of one whose quarantine is over. True if it was closed now."""
        load = self._loads[worker.id]
        was_open = load.is_open
        self._refresh(worker, now)
        return was_open and not load.is_open

    def _refresh(self, worker: Worker, now: float) -> None:
        load = self._loads[worker.id]
        load.is_open = is_routable(worker, now)
        load.score = worker.perf * (FLAGGED_SHARE if worker.flag else 1.0)


def lasting(worker: Worker) -> tuple[object, ...]:
    """What of a worker is worth a write when it changes."""
    return (
        worker.state,
        worker.intent,
        worker.url,
        worker.incarnation,
        worker.measured_perf,
        worker.generation,
        worker.gpu_name,
        worker.failures,
        worker.flag,
    )


def check_token(worker: Worker | None, worker_id: int, mtoken: str) -> Worker:
    """The worker, if there is one and this is its token. Raises Unauthorized."""
    if worker is None or not hmac.compare_digest(worker.mtoken.encode(), mtoken.encode()):
        raise Unauthorized("this worker id and token are not known", worker_id=worker_id)
    return worker


def revived(worker: Worker, now: float, *, trusted_s: float = 0.0) -> Worker:
    """A worker read from the store at start: out of routing until it reports, and given a moment to do so.

    trusted_s: for so long it is routed to without a report, since it is known to be there.
    """
    return msgspec.structs.replace(
        worker,
        last_report_at=0.0 if worker.last_report_at == 0.0 else now - SILENT_AFTER_S + trusted_s,
        cur_load=0.0,
        quarantined_until=0.0,
    )

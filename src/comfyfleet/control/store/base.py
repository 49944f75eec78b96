"""The store's contract. One rule for every implementation, checked by `tests/contract/test_store.py`.

**Durability.** When a method that changes something returns, the change survives kill -9 and loss of power.
**Leases.** A waiting job is leased by one guarded update (status still `queued`), which writes a token and an expiry
into the row. Every later change by the holder is guarded by that token: no row changed means the lease was lost, and
the caller drops what it had. An expired lease is still the holder's until somebody takes it; `take_over` and `requeue`
change the token, so there is never more than one holder.
**Isolation.** A method is one transaction; no I/O of the caller's happens inside.
**Fences.** Where several control planes share the database, a write that only an endpoint's owner may make carries its
fence, compared in the same transaction: an owner of yesterday writes nothing (Fenced). None: there is only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from comfyfleet.control.jobs import Job, JobEvent, JobFilter, JobHead, Lease, Waiting
from comfyfleet.control.ownership import Fence, Replica, Roll
from comfyfleet.control.records import (
    AccountVariable,
    ApiKey,
    DecisionRow,
    DemandRow,
    Endpoint,
    LearnedRow,
    LogRow,
    ScopeUse,
    Template,
    UsageRow,
    Workergroup,
    WorkerRow,
)
from comfyfleet.control.store.news import Hear
from comfyfleet.wire.jobs import JobStatus

Record = Endpoint | Workergroup | Template | ApiKey | AccountVariable | WorkerRow | LearnedRow | DemandRow
R = TypeVar("R", Endpoint, Workergroup, Template, ApiKey, AccountVariable, WorkerRow, LearnedRow, DemandRow)


class NameTaken(Exception):
    """Another living record of that kind has the name."""


class KeyTaken(Exception):
    """An earlier job (`job_id`) has that idempotency key, and another digest."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a submitted job: `job` is the stored one, an earlier one with the same key if `is_repeat`."""

    job: Job
    is_repeat: bool


class UsageSum(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger summed over one kind."""

    endpoint_id: int
    scope: str
    kind: str
    seconds: float
    price: float


class Store(Protocol):
    """Everything the control plane remembers."""

    async def close(self) -> None: ...

    async def listen(self, hear: Hear) -> None:
        """Until cancelled: pass on what other processes that share the database tell. Hints, never the truth."""
        ...

    # --- records -------------------------------------------------------------------------------------------------
    async def all(self, kind: type[R]) -> list[R]:
        """Every record of a kind, by id."""
        ...

    async def get(self, kind: type[R], record_id: int | str) -> R | None:
        """One record."""
        ...

    async def put(self, record: Record, *, fence: Fence | None = None) -> None:
        """Insert or replace. Raises NameTaken for an endpoint whose name another living one has."""
        ...

    async def drop(self, kind: type[Record], record_id: int | str, *, fence: Fence | None = None) -> None:
        """Remove; nothing happens if it is not there."""
        ...

    async def reserve(self, counter: str, count: int = 1) -> int:
        """The first of `count` numbers nobody else gets; a counter starts at 1 and never goes back."""
        ...

    # --- what happened -------------------------------------------------------------------------------------------
    async def add_decision(self, decision: DecisionRow, *, fence: Fence | None = None) -> None: ...

    async def decisions(self, endpoint_id: int, *, limit: int = 100, before_id: int | None = None) -> list[DecisionRow]:
        """Newest first."""
        ...

    async def add_logs(self, lines: Sequence[LogRow]) -> None: ...

    async def logs(self, *, endpoint_id: int | None, workergroup_id: int | None, tail: int) -> list[LogRow]:
        """The newest `tail` lines, oldest of them first."""
        ...

    async def forget_logs(self, before: float) -> int:
        """Remove lines older than that; how many."""
        ...

    async def add_usage(self, rows: Sequence[UsageRow]) -> None: ...

    async def usage(self, *, since: float, until: float, scope: str | None = None) -> list[UsageSum]:
        """Sums of what began in [since, until)."""
        ...

    # --- durable jobs --------------------------------------------------------------------------------------------
    async def add_jobs(self, jobs: Sequence[Job]) -> list[Added]:
        """Store new jobs, all or none; one whose (scope, idempotency_key) is known is not stored again.

        Raises KeyTaken, and stores none, where that key's job has another digest.
        """
        ...

    async def known(self, scope: str, keys: Sequence[str]) -> dict[str, Job]:
        """The jobs of a scope that have these idempotency keys, by key."""
        ...

    async def job(self, job_id: str) -> Job | None: ...

    async def jobs(self, wanted: JobFilter) -> list[Job]:
        """Newest first, without `input`."""
        ...

    async def waiting(self) -> list[Waiting]:
        """What waits, per endpoint and scope."""
        ...

    async def position(self, job: Job) -> int:
        """How many waiting jobs of the same endpoint and scope go before it."""
        ...

    async def head(self, endpoint_id: int, scope: str, now: float) -> JobHead | None:
        """The next job of a scope: smallest rank among those whose `not_before` has come."""
        ...

    async def lease(self, lease: Lease, *, fence: Fence | None = None) -> Job | None:
        """Lease a waiting job; None if it is not waiting any more."""
        ...

    async def leased(self) -> list[Job]:
        """Every job that some worker has, expired or not."""
        ...

    async def take_over(
        self, job_id: str, *, old_token: str, token: str, expires_at: float, fence: Fence | None = None
    ) -> bool:
        """Change the holder's token, the worker stays: what a restarted control plane does."""
        ...

    async def renew(self, job_id: str, *, token: str, expires_at: float) -> bool: ...

    async def start(self, job_id: str, *, token: str, now: float) -> bool:
        """LEASED to RUNNING; True also if it runs already."""
        ...

    async def finish(
        self, job_id: str, *, token: str, status: JobStatus, result: str | None, error: str | None, now: float
    ) -> bool:
        """To a final status, with its event. False: the lease was lost, drop the result."""
        ...

    async def requeue(
        self, job_id: str, *, token: str, lost_worker: int | None, not_before: float, reason: str, now: float
    ) -> JobStatus | None:
        """Back to waiting, with its event; cancelled, if its caller wants it no more. None: the lease was lost.

        lost_worker: remembered as one that did not bring it back, once for each time.
        """
        ...

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """A waiting job becomes cancelled; a leased one is marked, and its holder ends it. None: no such job."""
        ...

    async def fail_waiting(self, job_id: str, *, error: str, now: float) -> bool:
        """Fail a job that no worker has (deadline, endpoint gone)."""
        ...

    async def overdue(self, now: float) -> list[str]:
        """Ids of waiting jobs past their deadline, at most 1000."""
        ...

    async def add_event(self, job_id: str, *, kind: str, data: str, now: float) -> JobEvent: ...

    async def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """Events with a larger seq, in order; `queued` (seq 1) included."""
        ...

    async def undelivered(self) -> list[str]:
        """Ids of final jobs whose webhook no outbox has."""
        ...

    async def webhook_out(self, job_id: str, *, fence: Fence | None = None) -> None:
        """An outbox has it, until `webhook_ended`; what is needed to tell it stays with the job as long."""
        ...

    async def webhook_ended(self, job_id: str) -> None:
        """The receiver was told, or given up."""
        ...

    async def webhooks_due_again(self, endpoint_id: int, *, fence: Fence | None = None) -> None:
        """Whatever outbox had the endpoint's webhooks may be gone."""
        ...

    async def has_untold(self, endpoint_id: int) -> bool:
        """Some webhook of the endpoint is due, or out."""
        ...

    async def prune(self, finished_before: float) -> int:
        """Remove final jobs and their events older than that; how many."""
        ...

    # --- several control planes ----------------------------------------------------------------------------------
    async def enrol(self, replica: Replica, lease_s: float) -> None:
        """A new replica, under an id that nobody ever had."""
        ...

    async def attend(self, replica_id: str, lease_s: float) -> Roll:
        """Renew one replica's lease if it stands, end those that are over, and say who owns what."""
        ...

    async def take(self, replica_id: str, wanted: Sequence[tuple[int, int]]) -> list[Fence]:
        """Of (endpoint, fence seen; 0: none), those whose owner is off the roll and whose fence is still that one."""
        ...

    async def release(self, fences: Sequence[Fence]) -> None:
        """Let endpoints go; nothing happens to those taken by others meanwhile."""
        ...

    async def leave(self, replica_id: str) -> None:
        """Off the roll; what it owned is free at once."""
        ...

    async def share_use(self, used: Sequence[ScopeUse]) -> list[ScopeUse]:
        """Add what this replica's keys used to the sums of all replicas; returns the sums."""
        ...

    async def records_version(self) -> int:
        """Grows with every change of a record other than a worker's."""
        ...

    async def secret(self, name: str) -> str | None:
        """A sealed secret that all replicas share."""
        ...

    async def agree_on_secret(self, name: str, sealed: str) -> str:
        """The sealed secret that all share from now on: this one, if there was none."""
        ...

"""Durable jobs as values: what is stored of one, what is waiting, what happened to it. No I/O.

`Job.input` never holds a secret: what a request names of them (S3 keys, a webhook's secret, headers) is sealed apart
and put back only into the copy that a worker gets. `rank` orders waiting jobs of one scope: a smaller one goes first.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from comfyfleet.wire.jobs import JobStatus

_JOB_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
# One step of priority is worth this much waiting: so a low job overtakes newer high ones in the end.
AGEING_S = 600.0
MAX_PRIORITY = 100
# A job whose worker was lost this often, be it one worker or several, is stopped.
POISON_AFTER_LOSSES = 3


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Times are epoch seconds; `input`, `metadata`, `webhook`, `result` and `error` are JSON text."""

    id: str
    endpoint_id: int
    scope: str
    status: JobStatus
    priority: int
    cost: float
    rank: float
    created_at: float
    not_before: float
    input: str
    digest: str
    deadline_at: float | None = None
    idempotency_key: str | None = None
    shape: str = ""
    models: str = "[]"
    sealed: str = ""
    metadata: str = "{}"
    webhook: str = ""
    attempts: int = 0
    lost_workers: str = "[]"
    lease_token: str | None = None
    lease_expires: float | None = None
    worker_id: int | None = None
    worker_url: str | None = None
    request_idx: int | None = None
    cancel_requested: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    result: str | None = None
    error: str | None = None

    @property
    def lost_on(self) -> frozenset[int]:
        return frozenset(msgspec.json.decode(self.lost_workers, type=list[int]))

    @property
    def losses(self) -> int:
        """How often a worker was lost with it: `lost_workers` names one that was lost twice two times."""
        return len(msgspec.json.decode(self.lost_workers, type=list[int]))

    @property
    def is_final(self) -> bool:
        return self.status in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


class JobHead(msgspec.Struct, frozen=True, kw_only=True):
    """What the dispatcher must know of a waiting job to find it a worker."""

    id: str
    endpoint_id: int
    scope: str
    priority: int
    cost: float
    rank: float
    created_at: float
    shape: str
    models: str
    lost_workers: str

    @property
    def lost_on(self) -> frozenset[int]:
        return frozenset(msgspec.json.decode(self.lost_workers, type=list[int]))


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's right to a job. Whoever holds the token may renew, finish or give back; nobody else."""

    job_id: str
    token: str
    leased_at: float
    expires_at: float
    worker_id: int
    worker_url: str
    request_idx: int


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened; `seq` grows by one within a job and is the SSE id. 1 is always `queued`."""

    job_id: str
    seq: int
    at: float
    kind: str
    data: str


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one scope waits at one endpoint."""

    endpoint_id: int
    scope: str
    jobs: int
    cost: float
    oldest_at: float


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs a listing shows; `scope` None is all (an admin). before: jobs older than this (created_at, id)."""

    scope: str | None
    endpoint_id: int | None = None
    status: JobStatus | None = None
    before: tuple[float, str] | None = None
    limit: int = 50


def is_job_id(text: str) -> bool:
    """Whether a job could have that id. Others are none of the database's business, which may choke on them (NUL)."""
    return _JOB_ID.fullmatch(text) is not None


def rank(created_at: float, priority: int) -> float:
    """Static, although it ages: every waiting job gains at the same pace, so their order never changes by itself."""
    return created_at - priority * AGEING_S


def request_digest(body: Any, *, cost: float, priority: int, deadline_s: float | None) -> str:
    """Of what is to be made, and on which terms: these stand apart, since jobs stored by older versions have none."""
    return f"{content_digest(body)}.{float(cost)} {priority} {deadline_s and float(deadline_s)}"


def is_same_request(stored: str, given: str) -> bool:
    """Whether `given`, a `request_digest`, is the stored job's. One stored without terms has any."""
    return given == stored or given.partition(".")[0] == stored


def content_digest(value: Any) -> str:
    """SHA-256 of canonical JSON: two bodies that mean the same have one digest."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()

"""Which endpoint a request is about, for requests that only the endpoint's owner can answer well. Parses, never judges.

A body that cannot be read is nobody's: whoever got it refuses it. What is in the database alone (records, usage, logs,
a finished job, a job's events) has no rule, and is answered by any replica.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from comfyfleet.control.catalog import Catalog
from comfyfleet.control.jobs import Job, is_job_id
from comfyfleet.control.ownership import LEASE_S
from comfyfleet.control.records import WorkerRow
from comfyfleet.control.store.base import Store
from comfyfleet.control.workers import Workers
from comfyfleet.ids import Ids
from comfyfleet.wire.jobs import JobStatus


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, as far as it says whose it is."""

    scope: MutableMapping[str, Any]
    body: bytes

    @property
    def number(self) -> int:
        """The last number in the path."""
        return int(re.findall(r"\d+", self.scope["path"])[-1])


Find = Callable[[Asked], Awaitable[int | None]]
Headers = list[tuple[bytes, bytes]]
ExtraHeaders = Callable[[bytes, set[bytes]], Headers | None]


def _none(_body: bytes, _names: set[bytes]) -> Headers:
    return []


@dataclass(frozen=True, kw_only=True)
class Rule:
    """is_repeatable: the same again does no harm. is_local_without_owner: any replica can answer at a pinch.

    wait_s: how long a request waits for an endpoint to have an owner; a new one is there after a lease, a look at the
    roll, and loading, and the public client gives up on `/route/` at 10 s.
    extra_headers: what makes it repeatable, from the body and the names that are there; None: nothing can.
    """

    find: Find
    is_repeatable: bool = True
    is_local_without_owner: bool = False
    wait_s: float = LEASE_S + 3.0
    extra_headers: ExtraHeaders = _none


class _Body(msgspec.Struct):
    """Every field by which any body names an endpoint, a worker or a workergroup."""

    endpoint: str | int = ""
    id: int | None = None
    worker_id: int = 0
    workergroup_id: int = 0


class _JobInput(msgspec.Struct):
    request_id: Any = ""


class _JobBody(msgspec.Struct):
    endpoint: str | int = ""
    idempotency_key: str = ""
    input: _JobInput = msgspec.field(default_factory=_JobInput)


class _Batch(msgspec.Struct):
    jobs: list[_JobBody] = msgspec.field(default_factory=list)


_KEY = b"idempotency-key"
_body = msgspec.json.Decoder(_Body, strict=False)
_job_body = msgspec.json.Decoder(_JobBody, strict=False)
_batch = msgspec.json.Decoder(_Batch, strict=False)
# Served without a look at the records: files, keys, health, metrics, and jobs, whose doors look for themselves.
_NOT_OF_RECORDS = ("/files/", "/pubkey/", "/health", "/metrics", "/static/", "/docs", "/openapi.json")


class Whose:
    """Rules by method and path."""

    def __init__(self, *, catalog: Catalog, workers: Workers, store: Store, ids: Ids) -> None:
        self._catalog = catalog
        self._workers = workers
        self._store = store
        self._ids = ids
        self._endpoint_of: dict[int, int] = {}  # of each worker ever heard of; it never changes
        route = Rule(find=self._by_endpoint, is_local_without_owner=True)
        report = Rule(find=self._by_worker, wait_s=2.0)  # a worker repeats it within seconds
        submit = Rule(find=self._by_job_body, is_local_without_owner=True, extra_headers=self._once)
        self._exact: dict[tuple[str, str], Rule] = {
            ("POST", "/route/"): route,
            ("POST", "/worker_status/"): report,
            ("POST", "/delete_requests/"): report,
            ("POST", "/v1/jobs"): submit,
            ("POST", "/v1/jobs/batch"): Rule(
                find=self._by_batch, is_local_without_owner=True, extra_headers=self._once_a_batch
            ),
            ("POST", "/get_endpoint_workers/"): Rule(find=self._by_id_or_endpoint, is_local_without_owner=True),
            ("POST", "/v1/workers"): Rule(find=self._by_endpoint, is_repeatable=False),
            ("POST", "/update_workers/"): Rule(find=self._by_workergroup, is_local_without_owner=True),
        }
        of_job = Rule(find=self._by_waiting_job, is_local_without_owner=True)
        by_endpoint = Rule(find=self._by_endpoint_number, is_local_without_owner=True)
        by_group = Rule(find=self._by_group_number, is_local_without_owner=True)
        by_worker = Rule(find=self._by_worker_number)
        self._patterns: list[tuple[str, re.Pattern[str], Rule]] = [
            ("GET", re.compile(r"/v1/jobs/[^/]+"), of_job),
            ("POST", re.compile(r"/v1/jobs/[^/]+/cancel"), Rule(find=self._by_job, is_local_without_owner=True)),
            ("DELETE", re.compile(r"/api/v0/endptjobs/\d{1,18}/?"), by_endpoint),
            ("DELETE", re.compile(r"/api/v0/(?:workergroups|autojobs)/\d{1,18}/?"), by_group),
            ("DELETE", re.compile(r"/v1/workers/\d{1,18}"), by_worker),
            ("GET", re.compile(r"/v1/workers/\d{1,18}/logs"), by_worker),
            ("GET", re.compile(r"/api/v0/instances/\d{1,18}/?"), by_worker),
        ]

    def rule(self, method: str, path: str) -> Rule | None:
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact
        for of, pattern, rule in self._patterns:
            if of == method and pattern.fullmatch(path):
                return rule
        return None

    def is_of_records(self, path: str) -> bool:
        """Whether the answer depends on records that another replica may have changed."""
        return not path.startswith(_NOT_OF_RECORDS)

    # --- finding -------------------------------------------------------------------------------------------------
    async def _by_endpoint(self, asked: Asked) -> int | None:
        body = _decoded(_body, asked.body)
        return None if body is None else self._named(body.endpoint)

    async def _by_id_or_endpoint(self, asked: Asked) -> int | None:
        body = _decoded(_body, asked.body)
        if body is None:
            return None
        return body.id if body.id is not None and self._catalog.endpoint(body.id) else self._named(body.endpoint)

    async def _by_job_body(self, asked: Asked) -> int | None:
        body = _decoded(_job_body, asked.body)
        return None if body is None else self._named(body.endpoint)

    async def _by_batch(self, asked: Asked) -> int | None:
        """Its first job's: the others' owners find theirs in the database."""
        body = _decoded(_batch, asked.body)
        return None if body is None or not body.jobs else self._named(body.jobs[0].endpoint)

    async def _by_worker(self, asked: Asked) -> int | None:
        body = _decoded(_body, asked.body)
        return None if body is None else await self._of_worker(body.worker_id or body.id or 0)

    async def _by_worker_number(self, asked: Asked) -> int | None:
        return await self._of_worker(asked.number)

    async def _by_endpoint_number(self, asked: Asked) -> int | None:
        endpoint = self._catalog.endpoint(asked.number)
        return None if endpoint is None else endpoint.id

    async def _by_group_number(self, asked: Asked) -> int | None:
        group = self._catalog.workergroup(asked.number)
        return None if group is None else group.endpoint_id

    async def _by_workergroup(self, asked: Asked) -> int | None:
        body = _decoded(_body, asked.body)
        group = None if body is None else self._catalog.workergroup(body.workergroup_id)
        return None if group is None else group.endpoint_id

    async def _job(self, asked: Asked) -> Job | None:
        job_id = asked.scope["path"].split("/")[3]
        return await self._store.job(job_id) if is_job_id(job_id) else None

    async def _by_job(self, asked: Asked) -> int | None:
        job = await self._job(asked)
        return None if job is None or job.is_final else job.endpoint_id

    async def _by_waiting_job(self, asked: Asked) -> int | None:
        """Only its owner knows why a job waits; of any other the database knows all."""
        job = await self._job(asked)
        return None if job is None or job.status is not JobStatus.QUEUED else job.endpoint_id

    def _named(self, endpoint: str | int) -> int | None:
        found = (
            self._catalog.endpoint(endpoint) if isinstance(endpoint, int) else self._catalog.endpoint_named(endpoint)
        )
        return None if found is None else found.id

    async def _of_worker(self, worker_id: int) -> int | None:
        known = self._workers.get(worker_id)
        if known is not None:
            return known.endpoint_id
        endpoint_id = self._endpoint_of.get(worker_id)
        if endpoint_id is None and 0 < worker_id < 2**63:
            row = await self._store.get(WorkerRow, worker_id)
            if row is not None:
                endpoint_id = self._endpoint_of[worker_id] = row.endpoint_id
        return endpoint_id

    # --- a submit can be sent twice -------------------------------------------------------------------------------
    def _once(self, raw: bytes, names: set[bytes]) -> Headers:
        """A key of ours for a job that has none, so that it is stored once however often it is sent."""
        body = _decoded(_job_body, raw)
        if body is None or _has_key(body) or _KEY in names:
            return []
        return [(_KEY, self._ids.request_id().encode())]

    def _once_a_batch(self, raw: bytes, names: set[bytes]) -> Headers | None:
        """One key for all, if none has its own: ours would stand over an `input.request_id`."""
        body = _decoded(_batch, raw)
        keyed = [_has_key(job) for job in body.jobs] if body is not None else []
        if _KEY in names or (keyed and all(keyed)):
            return []
        return None if any(keyed) else [(_KEY, self._ids.request_id().encode())]


def _has_key(job: _JobBody) -> bool:
    return bool(job.idempotency_key or job.input.request_id)


def _decoded(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None

"""Which durable jobs are accepted, and what is stored of them. Checked whole before anything is stored.

A repeat under the same key (`Idempotency-Key`, else `input.request_id`, within the caller's scope) is the first job
again; another body under that key is refused. Secrets in a request (S3, webhook) are sealed apart from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from comfyfleet.clock import Clock
from comfyfleet.control.auth import JOBS, Principal
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.jobs import MAX_PRIORITY, Job, is_same_request, rank, request_digest
from comfyfleet.control.keys import Vault
from comfyfleet.control.learned_cost import LearnedCost
from comfyfleet.control.limits import Limits
from comfyfleet.control.promises import Promises
from comfyfleet.control.records import Endpoint
from comfyfleet.control.store.base import Added, KeyTaken, Store
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.ids import Ids
from comfyfleet.settings.outreach import WebhookSettings
from comfyfleet.settings.storage import S3Settings
from comfyfleet.webhooks.receivers import check_receiver
from comfyfleet.wire.errors import (
    FleetError,
    IdempotencyMismatch,
    InvalidArguments,
    NotFound,
    TooManyRequests,
    WorkflowRefused,
)
from comfyfleet.wire.file_inputs import file_references
from comfyfleet.wire.generation import GenerateInput, S3Target, WebhookTarget
from comfyfleet.wire.jobs import JobStatus
from comfyfleet.wire.requests import check_request, check_s3, parse_input, without_blanks
from comfyfleet.wire.shapes import models_of, shape_of
from comfyfleet.wire.workflow import parse_graph, unfit_value

MAX_BATCH = 1000
MAX_METADATA_BYTES = 16_384
MAX_DEADLINE_S = 30 * 86_400.0
_APART_S = 1e-6  # between the jobs of a batch: a double tells times of this century that far apart
_SHALLOW = 400  # with no more brackets than this, nothing is deep
_ROOM = 32  # levels that others may put around an input or metadata
_KEY = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,254}")
# To the end of the JSON string, and so past every other address in it: the search is linear in any text.
_AFTER_SCHEME = re.compile(r'://([^"\\]*(?:\\.[^"\\]*)*)')
SEALED = "job secrets"


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/jobs. endpoint: name or id. cost: load units. priority: -100 to 100, higher first.

    deadline_s: seconds from now until the job is worthless. metadata: the caller's own, returned with the job.
    """

    endpoint: str | int
    input: dict[str, Any]
    cost: float = 100.0
    priority: int = 0
    deadline_s: float | None = None
    webhook: WebhookTarget | None = None
    metadata: dict[str, Any] = {}
    idempotency_key: str = ""


class JobSecrets(msgspec.Struct, frozen=True, kw_only=True):
    """What is sealed of a request."""

    s3: dict[str, Any] = {}
    webhook: WebhookTarget = WebhookTarget()
    input: str = ""  # the whole input, where it carries headers for what it names, or addresses with secrets


class Admission:
    """Accepts jobs."""

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        learned: LearnedCost,
        limits: Limits,
        promises: Promises,
        vault: Vault,
        fetcher: GuardedFetcher,
        anywhere: GuardedFetcher,
        operator: WebhookSettings,
        s3_of: Callable[[int], S3Settings | None],
        clock: Clock,
        ids: Ids,
    ) -> None:
        """anywhere: a fetcher without address rules. s3_of: what an endpoint's workers bring; None: nobody knows."""
        self._store = store
        self._catalog = catalog
        self._learned = learned
        self._limits = limits
        self._promises = promises
        self._vault = vault
        self._fetcher = fetcher
        self._anywhere = anywhere
        self._operator = operator
        self._s3_of = s3_of
        self._clock = clock
        self._ids = ids

    async def submit(self, principal: Principal, requests: Sequence[JobRequest], waiting: int) -> list[Added]:
        """Store them all, or none. waiting: jobs of this scope that wait already.

        Raises BadRequest, Unprocessable, IdempotencyMismatch, NotFound, TooManyRequests. What a worker would refuse of
        an input without looking at its engine is refused here, in the same words (`wire.requests`).
        """
        principal.demand(JOBS)
        if not 0 < len(requests) <= MAX_BATCH:
            raise InvalidArguments(f"a batch has 1 to {MAX_BATCH} jobs", field="jobs")
        now = self._clock.now()
        try:
            return await self._within_limits(principal, requests, waiting, now)
        except TooManyRequests:
            # Whose first answer was lost asks again, and must learn its job's id: that takes no room any more.
            repeats = await self._repeats(principal, requests, now)
            if not repeats:
                raise
            return repeats

    async def _within_limits(
        self, principal: Principal, requests: Sequence[JobRequest], waiting: int, now: float
    ) -> list[Added]:
        """Raises TooManyRequests before anything is stored."""
        self._limits.admit(principal, len(requests), now)
        self._limits.admit_waiting(principal, waiting, len(requests))
        jobs = self._jobs(principal, requests, now)
        has_quota = principal.limits.gpu_seconds_per_day > 0
        seconds = sum(self._promises.seconds(job.endpoint_id, job.cost) for job in jobs) if has_quota else 0.0
        self._limits.admit_seconds(principal, now, count=len(jobs), seconds=seconds)
        with self._limits.arriving(principal.scope, len(jobs), seconds):
            return await self._stored(jobs)

    async def _repeats(self, principal: Principal, requests: Sequence[JobRequest], now: float) -> list[Added]:
        """All of them, as they are known already; else nothing."""
        if not all(request.idempotency_key or request.input.get("request_id") for request in requests):
            return []
        jobs = self._jobs(principal, requests, now)
        known = await self._store.known(principal.scope, [job.idempotency_key or "" for job in jobs])
        earlier = [known.get(job.idempotency_key or "") for job in jobs]
        repeats = [
            Added(job=stored, is_repeat=True)
            for job, stored in zip(jobs, earlier, strict=True)
            if stored is not None and is_same_request(stored.digest, job.digest)
        ]
        return repeats if len(repeats) == len(jobs) else []

    async def _stored(self, jobs: list[Job]) -> list[Added]:
        """Only the store can say whether a key is free: whoever asks before it stores has asked too early."""
        digests: dict[str, str] = {}
        for job in jobs:
            if job.idempotency_key and digests.setdefault(job.idempotency_key, job.digest) != job.digest:
                raise IdempotencyMismatch(f"two jobs of this batch have the idempotency key {job.idempotency_key!r}")
        try:
            return await self._store.add_jobs(jobs)
        except KeyTaken as taken:
            raise IdempotencyMismatch(
                "this idempotency key was used before with another body", id=taken.job_id
            ) from taken

    def _jobs(self, principal: Principal, requests: Sequence[JobRequest], now: float) -> list[Job]:
        """A batch's order is that of its times: of jobs that came at one time, chance has the say."""
        return [
            self._checked(principal, request, now + number * _APART_S, f"jobs[{number}]" if len(requests) > 1 else "")
            for number, request in enumerate(requests)
        ]

    def _checked(self, principal: Principal, request: JobRequest, now: float, place: str) -> Job:
        """place: of this job in its batch, for whoever is told what is wrong with it."""
        try:
            return self._job(principal, request, now)
        except RecursionError as error:  # in one of the checks that walk the input
            raise _too_deep(f"{place}.input" if place else "input") from error
        except FleetError as error:
            if place:
                error.details["field"] = ".".join(filter(None, (place, error.details.get("field"))))
            raise

    def _job(self, principal: Principal, request: JobRequest, now: float) -> Job:
        endpoint = self._endpoint(principal, request.endpoint)
        _check(request)
        metadata = _json(request.metadata, "metadata")
        if len(metadata) > MAX_METADATA_BYTES:
            raise InvalidArguments(f"metadata is over {MAX_METADATA_BYTES} bytes", field="metadata")
        given = without_blanks(request.input)
        asked = parse_input(given)
        check_request(asked)
        self._check_s3(asked.s3, endpoint)
        own = request.webhook if request.webhook is not None and request.webhook.url else None
        webhook, field = (own, "webhook") if own is not None else (asked.webhook, "input.webhook")
        check_receiver(webhook, self._operator, self._fetcher, field=field)
        shape, models = _checked_work(asked, given)
        s3 = given.pop("s3", {})
        given.pop("webhook", None)
        key = request.idempotency_key or asked.request_id
        text = _json(given, "input").decode()
        is_secret = bool(given.get("credentials")) or '"headers"' in text or has_secret_url(text)
        if is_secret:
            models = tuple(model for model in models if "://" not in model)
        secrets = JobSecrets(s3=s3, webhook=webhook, input=text if is_secret else "")
        sealed = ""
        if s3 or webhook.url or is_secret:
            sealed = self._vault.seal(msgspec.json.encode(secrets).decode(), SEALED)
        learned = self._learned.cost(endpoint.id, shape) if shape else None
        return Job(
            id=self._ids.ordered_id(now),
            endpoint_id=endpoint.id,
            scope=principal.scope,
            status=JobStatus.QUEUED,
            priority=request.priority,
            cost=request.cost if learned is None else learned,
            rank=rank(now, request.priority),
            created_at=now,
            not_before=0.0,
            input="{}" if is_secret else text,
            digest=request_digest(
                [endpoint.id, given, s3, msgspec.structs.asdict(webhook), request.metadata],
                cost=request.cost,
                priority=request.priority,
                deadline_s=request.deadline_s,
            ),
            deadline_at=None if request.deadline_s is None else now + request.deadline_s,
            idempotency_key=key or None,
            shape=shape,
            models=msgspec.json.encode(models).decode(),
            sealed=sealed,
            metadata=metadata.decode(),
            webhook="sealed" if webhook.url else "",
        )

    def _check_s3(self, target: S3Target, endpoint: Endpoint) -> None:
        if target == S3Target():
            return
        brought = self._s3_of(endpoint.id)
        check_s3(
            target,
            has_keys=brought is None or brought.has_keys,
            has_bucket=brought is None or bool(brought.bucket),
        )
        if target.endpoint_url:
            self._anywhere.check_url(target.endpoint_url, field="input.s3.endpoint_url")

    def _endpoint(self, principal: Principal, wanted: str | int) -> Endpoint:
        endpoint = (
            self._catalog.endpoint(wanted)
            if isinstance(wanted, int)
            else self._catalog.endpoint_named(wanted, principal.user_id)
        )
        if endpoint is None or endpoint.deleted_at is not None or not principal.may(JOBS, endpoint.id):
            raise NotFound(f"there is no endpoint {wanted!r}", field="endpoint")
        return endpoint


def has_secret_url(text: str) -> bool:
    """Whether an address in a JSON text has what passwords and signatures stand in: `user:password@`, or a query."""
    return "://" in text and any("@" in rest or "?" in rest for rest in _AFTER_SCHEME.findall(text))


def _check(request: JobRequest) -> None:
    if not 0 < request.cost <= 1e9:
        raise InvalidArguments("cost must be over 0 and at most 1e9", field="cost")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidArguments(f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}", field="priority")
    if request.deadline_s is not None and not 0 < request.deadline_s <= MAX_DEADLINE_S:
        raise InvalidArguments("deadline_s must be over 0 and at most 30 days", field="deadline_s")
    if request.idempotency_key and not _KEY.fullmatch(request.idempotency_key):
        raise InvalidArguments("an idempotency key has 1 to 255 printable characters", field="Idempotency-Key")


def _json(value: Any, field: str) -> bytes:
    """Refused where it would not fit into something larger, such as a digest or a worker's request."""
    try:
        text = msgspec.json.encode(value)
        if text.count(b"[") + text.count(b"{") > _SHALLOW:
            for _ in range(_ROOM):
                value = [value]
            msgspec.json.encode(value)
    except RecursionError as error:
        raise _too_deep(field) from error
    return text


def _too_deep(field: str) -> InvalidArguments:
    return InvalidArguments(f"{field} is nested too deep", field=field)


def _checked_work(request: GenerateInput, given: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """(shape, models) of what is to be run. Raises WorkflowRefused naming the node, or BadRequest."""
    if request.modifier:
        if reason := unfit_value(request.modifications):
            raise WorkflowRefused(f"input.modifications: {reason}", field="input.modifications")
        return "", ()
    graph = parse_graph(request.workflow_json, field="input.workflow_json")
    file_references(graph)
    given["workflow_json"] = graph
    return shape_of(graph), models_of(graph)

"""`/v1/jobs`: submit (one or a batch), list, look, follow, cancel. A key sees its own jobs; an admin sees all.

Events are server-sent and numbered per job; `Last-Event-ID` (or `?after=`) replays from any place, also after the
control plane was restarted, for as long as the job is kept.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from comfyfleet.control.admission import JobRequest
from comfyfleet.control.api.calling import Caller, add, query_number
from comfyfleet.control.api.job_events import JobEvents
from comfyfleet.control.auth import JOBS, Principal
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.desk import Desk
from comfyfleet.control.durable import DurablePlane
from comfyfleet.control.fresh_links import FreshLinks
from comfyfleet.control.jobs import Job, JobFilter, is_job_id
from comfyfleet.control.metrics import Metrics
from comfyfleet.control.store.base import Added, Store
from comfyfleet.web import JsonResponse, control_error, finite, whole_number
from comfyfleet.wire.errors import FleetError, InvalidArguments, NotFound
from comfyfleet.wire.jobs import JobStatus

_MAX_LISTED = 500


class BatchBody(msgspec.Struct, kw_only=True):
    """POST /v1/jobs/batch: all are accepted, or none."""

    jobs: list[JobRequest]


class JobApi:
    """Handlers over one durable plane. base_url: what the links in answers begin with, "" for the request's own."""

    def __init__(
        self,
        *,
        plane: DurablePlane,
        store: Store,
        catalog: Catalog,
        desk: Desk,
        metrics: Metrics,
        caller: Caller,
        links: FreshLinks,
        base_url: str,
    ) -> None:
        self._events = JobEvents(store=store, feed=plane.feed, ownership=plane.ownership, links=links)
        self._links = links
        self._plane = plane
        self._store = store
        self._catalog = catalog
        self._desk = desk
        self._metrics = metrics
        self._caller = caller
        self._base_url = base_url

    def hot_routes(self) -> list[BaseRoute]:
        """Looking, off FastAPI's machinery; `router` documents it."""
        return [Route("/v1/jobs/{job_id:str}", _rendered(self.show), methods=["GET"])]

    def router(self) -> APIRouter:
        routes = APIRouter(tags=["jobs"])
        add(routes, ["POST"], ["/v1/jobs"], self.submit, summary="Submit a durable job", body=JobRequest)
        add(routes, ["POST"], ["/v1/jobs/batch"], self.submit_batch, summary="Submit many, or none", body=BatchBody)
        add(routes, ["GET"], ["/v1/jobs"], self.list_jobs, summary="This key's jobs, newest first")
        add(routes, ["GET"], ["/v1/jobs/{job_id}"], self.show, summary="One job: status, reason to wait, result")
        add(routes, ["GET"], ["/v1/jobs/{job_id}/events"], self.follow, summary="Its events, server-sent, with replay")
        add(routes, ["POST"], ["/v1/jobs/{job_id}/cancel"], self.cancel, summary="Cancel it, waiting or running")
        return routes

    # --- submitting --------------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> Response:
        principal, body = await self._caller.call(request, JobRequest)
        if key := request.headers.get("idempotency-key", ""):
            body = msgspec.structs.replace(body, idempotency_key=key)
        (added,) = await self._admit(principal, [body])
        headers = {"Idempotent-Replayed": "true"} if added.is_repeat else {}
        return JsonResponse(self._accepted(request, added), status_code=202, headers=headers)

    async def submit_batch(self, request: Request) -> Response:
        principal, body = await self._caller.call(request, BatchBody)
        key = request.headers.get("idempotency-key", "")
        jobs = [
            msgspec.structs.replace(job, idempotency_key=f"{key}:{number}") if key and not job.idempotency_key else job
            for number, job in enumerate(body.jobs)
        ]
        added = await self._admit(principal, jobs)
        return JsonResponse({"jobs": [self._accepted(request, one) for one in added]}, status_code=202)

    async def _admit(self, principal: Principal, bodies: list[JobRequest]) -> list[Added]:
        waiting = self._plane.backlog.of_scope(principal.scope)
        added = await self._plane.admission.submit(principal, bodies, waiting)
        fresh = [one.job for one in added if not one.is_repeat]
        self._plane.dispatcher.submitted(fresh)
        for job in fresh:
            self._metrics.jobs_submitted.labels(self._name(job.endpoint_id)).inc()
        return added

    def _accepted(self, request: Request, added: Added) -> dict[str, Any]:
        return {"id": added.job.id, "status": str(added.job.status), **self._urls(request, added.job.id)}

    # --- looking -----------------------------------------------------------------------------------------------------

    async def list_jobs(self, request: Request) -> Response:
        principal = await self._caller.principal(request)
        principal.demand(JOBS)
        wanted = self._filter(request, principal)
        jobs = await self._store.jobs(wanted)
        after = f"{jobs[-1].created_at!r},{jobs[-1].id}" if len(jobs) == wanted.limit else None
        return JsonResponse({"jobs": [self._view(request, job) for job in jobs], "next": after})

    async def show(self, request: Request) -> Response:
        job = await self._job(request)
        view = self._view(request, job)
        if job.status is JobStatus.QUEUED:
            position = await self._store.position(job)
            view["waiting"] = {"reason": self._desk.why(job.endpoint_id), "position": position, "scope": "your key"}
            if job.not_before > job.created_at:
                view["waiting"]["not_before"] = job.not_before
        elif job.status is JobStatus.LEASED:
            view["waiting"] = {"reason": f"worker {job.worker_id} is being given the job; next it runs there"}
        return JsonResponse(view)

    async def cancel(self, request: Request) -> Response:
        job = await self._job(request)
        now = self._plane.now()
        after = await self._store.cancel(job.id, now) or job
        # Whether it waited is told by what the call did to it; what was read before is old by then.
        has_waited = after.status is JobStatus.CANCELLED and after.finished_at == now
        self._plane.cancelled(after, has_waited=has_waited)
        return JsonResponse(self._view(request, after), status_code=200 if after.is_final else 202)

    # --- following ---------------------------------------------------------------------------------------------------

    async def follow(self, request: Request) -> Response:
        job = await self._job(request)
        last = whole_number(request.headers.get("last-event-id") or request.query_params.get("after") or "0")
        if last is None:
            raise InvalidArguments("Last-Event-ID is a number from an earlier event", field="Last-Event-ID")
        return StreamingResponse(
            self._events.frames(job, last),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    # --- rendering ---------------------------------------------------------------------------------------------------

    async def _job(self, request: Request) -> Job:
        """The job in the path, if this caller may see it. Raises NotFound."""
        principal = await self._caller.principal(request)
        principal.demand(JOBS)
        job_id = request.path_params["job_id"]
        job = await self._store.job(job_id) if is_job_id(job_id) else None
        if job is None or not (principal.sees_all or job.scope == principal.scope):
            raise NotFound("there is no such job of this key")
        return job

    def _filter(self, request: Request, principal: Principal) -> JobFilter:
        query = request.query_params
        status, before = query.get("status"), query.get("before")
        limit = query_number(request, "limit", 50, lowest=1, highest=_MAX_LISTED)
        if status is not None and status not in set(JobStatus):
            raise InvalidArguments(f"status is one of {', '.join(JobStatus)}", field="status")
        endpoint_id = None
        if name := query.get("endpoint"):
            endpoint = self._catalog.endpoint_named(name, principal.user_id)
            if endpoint is None or not principal.may(JOBS, endpoint.id):
                raise NotFound(f"there is no endpoint {name!r}", field="endpoint")
            endpoint_id = endpoint.id
        return JobFilter(
            scope=None if principal.sees_all else principal.scope,
            endpoint_id=endpoint_id,
            status=None if status is None else JobStatus(status),
            before=_cursor(before) if before else None,
            limit=limit,
        )

    def _view(self, request: Request, job: Job) -> dict[str, Any]:
        waiting = {"reason": self._desk.why(job.endpoint_id)} if job.status is JobStatus.QUEUED else None
        return {
            "id": job.id,
            "endpoint": self._name(job.endpoint_id),
            "waiting": waiting,
            "status": str(job.status),
            "priority": job.priority,
            "cost": job.cost,
            "created_at": job.created_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
            "deadline_at": job.deadline_at,
            "attempts": job.attempts,
            "worker_id": job.worker_id,
            "lost_workers": sorted(job.lost_on),
            "cancel_requested": bool(job.cancel_requested),
            "metadata": msgspec.Raw(job.metadata.encode()),
            "result": self._links.result(job),
            "error": msgspec.Raw(job.error.encode()) if job.error else None,
            **self._urls(request, job.id),
        }

    def _urls(self, request: Request, job_id: str) -> dict[str, str]:
        base = f"{self._base_url or _base_url(request)}/v1/jobs/{job_id}"
        return {"status_url": base, "events_url": f"{base}/events", "cancel_url": f"{base}/cancel"}

    def _name(self, endpoint_id: int) -> str:
        endpoint = self._catalog.endpoint(endpoint_id)
        return endpoint.endpoint_name if endpoint is not None else str(endpoint_id)


def _base_url(request: Request) -> str:
    """Where the caller found us. Starlette's own answer costs as much as storing a job."""
    host = request.headers.get("host")
    if host and not request.scope.get("root_path"):
        return f"{request.scope['scheme']}://{host}"
    return str(request.base_url).rstrip("/")


def _cursor(text: str) -> tuple[float, str]:
    """Where a page begins. What no page ever ended with is refused: databases differ in what they make of it."""
    at, _, job_id = text.partition(",")
    created_at = finite(at)
    if created_at is None or not is_job_id(job_id):
        raise InvalidArguments("before is the `next` of an earlier page", field="before")
    return created_at, job_id


def _rendered(handler: Any) -> Any:
    """Errors rendered here: cheaper than through the app's middleware."""

    async def handle(request: Request) -> Response:
        try:
            response: Response = await handler(request)
        except FleetError as error:
            return control_error(error)
        return response

    return handle

"""The wrapper's application: hot routes as plain ASGI, the rest and the documentation by FastAPI, a guard around."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from comfyfleet.clock import Clock
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.serve import files_app
from comfyfleet.web import JsonResponse, worker_error
from comfyfleet.wire.errors import BadRequest, FleetError, NotFound
from comfyfleet.worker.api.documented import GENERATE_BODY, GENERATE_RESPONSES, RESULT_RESPONSES
from comfyfleet.worker.api.generate import GenerateRoutes, live_view, result_response
from comfyfleet.worker.api.guard import Guard
from comfyfleet.worker.api.metrics import WorkerMetrics
from comfyfleet.worker.service import JobService


@dataclass(frozen=True, kw_only=True)
class FilesMount:
    """Where signed links of a standalone worker lead."""

    root: Path
    signer: UrlSigner


class _Switch:
    """Hot paths to their own app, everything else to FastAPI."""

    def __init__(self, hot: GenerateRoutes, rest: ASGIApp) -> None:
        self._hot = hot
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._hot.paths:
            await self._hot(scope, receive, send)
        else:
            await self._rest(scope, receive, send)


JobId = Annotated[str, PathParameter(description="The id of a job.", max_length=200)]


def build(
    service: JobService,
    *,
    clock: Clock,
    metrics: WorkerMetrics,
    key: str,
    max_body_bytes: int,
    include_response: bool,
    files: FilesMount | None,
    beside: APIRouter | None = None,
) -> ASGIApp:
    """The whole application. `beside`: routes that know files and webhooks (`api.files_and_hooks`)."""
    app = FastAPI(
        title="comfyfleet worker",
        version="1",
        description="Send a ComfyUI workflow, get its files back as links.",
        redoc_url=None,
    )
    hot = GenerateRoutes(service, clock, max_body_bytes=max_body_bytes, include_response=include_response)
    _error_handlers(app)
    _documented_only(app)

    @app.get("/result/{job_id}", responses=RESULT_RESPONSES, summary="A job's result, or how far it is")
    async def result(request: Request, job_id: JobId) -> Response:
        job = service.get(job_id)
        if "text/event-stream" in request.headers.get("accept", ""):
            return hot.follow(job, request.headers)
        if job.finished is None:
            return JsonResponse(live_view(service, job), status_code=202)
        return result_response(await service.signed_again(job), full=hot.wants_full(request.headers))

    @app.post("/cancel/{job_id}", responses=RESULT_RESPONSES, summary="Stop a job, queued or running")
    async def cancel(job_id: JobId) -> Response:
        job = await service.cancel(job_id)
        return JsonResponse(
            {"id": job.id, "status": job.status.value, "cancelled": job.status == "cancelled", "message": job.last_word}
        )

    @app.get("/queue-info", summary="What waits, what runs, and for how long")
    async def queue_info() -> Response:
        return JsonResponse(service.queue_view())

    @app.get("/health", responses={503: {"description": "Not Ready; `reason` says why."}}, summary="200 means Ready")
    async def health() -> Response:
        report = service.health()
        return JsonResponse(report, status_code=200 if report["ready"] else 503)

    @app.get("/metrics", summary="Prometheus")
    async def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if beside is not None:
        app.include_router(beside)
    if files is not None:
        app.mount("/files", files_app(files.root, files.signer))
    return Guard(_Switch(hot, app), key=key)


def _documented_only(app: FastAPI) -> None:
    """The hot routes for the OpenAPI page; `_Switch` answers them before FastAPI sees them."""

    async def answered_elsewhere() -> None:
        raise NotFound

    for path, summary in (
        ("/generate", "Accept a job (202); read it at /result/{id}"),
        ("/generate/sync", "Run a job and answer with its result"),
        ("/generate/stream", "Run a job and stream its progress (server-sent events)"),
    ):
        app.add_api_route(
            path,
            answered_elsewhere,
            methods=["POST"],
            summary=summary,
            responses=GENERATE_RESPONSES,
            openapi_extra={"requestBody": GENERATE_BODY},
            status_code=202 if path == "/generate" else 200,
        )


def _error_handlers(app: FastAPI) -> None:
    async def fleet_error(_request: Request, error: Exception) -> Response:
        return worker_error(error if isinstance(error, FleetError) else FleetError("internal error"))

    async def http_error(_request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return worker_error(FleetError("internal error"))
        if error.status_code == 404:
            return worker_error(NotFound("there is no such route"))
        answer = worker_error(BadRequest(str(error.detail)))  # 405 and its kin: the request's own fault
        answer.status_code = error.status_code
        answer.headers.update(error.headers or {})
        return answer

    async def shape_error(_request: Request, error: Exception) -> Response:
        first: Any = error.errors()[0] if isinstance(error, RequestValidationError) else {}
        field = ".".join(str(part) for part in first.get("loc", ()))
        return worker_error(BadRequest(f"{field}: {first.get('msg', '')}", field=field))

    app.add_exception_handler(FleetError, fleet_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, shape_error)

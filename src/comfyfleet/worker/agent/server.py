"""The worker's public port: every call shows a ticket, then takes the same way as a call of the wrapper.

    POST /generate, /generate/sync, /generate/stream   {auth_data, payload, session_id?}: uses the ticket up
    POST /result/{id}                                   {auth_data}: the job's result, or its events as a stream
    POST /cancel/{id}                                   {auth_data}
    POST /files/{id}/{path}                             {auth_data}: one of the job's outputs, as it is
    POST /progress                                      {auth_data}: the progress of the job started with this ticket
    POST /session/create, /session/get, /session/end, /session/health
    GET  /health                                        for load balancers; the only route without a ticket

A job's scope is the ticket's `sub`, so one key's results and ids are invisible to another. The job is followed here to
its end, whoever hangs up, because the control plane must learn what became of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from comfyfleet.clock import Clock
from comfyfleet.web import NOT_JSON, JsonResponse, sse_frame, worker_error
from comfyfleet.wire.errors import FleetError, NotFound, Unauthorized, Unavailable, Unprocessable
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.wire.requests import parse_payload
from comfyfleet.wire.tickets import TicketClaims
from comfyfleet.worker.agent.load_book import LoadBook, RunFacts
from comfyfleet.worker.agent.session_routes import SessionRoutes
from comfyfleet.worker.agent.sessions import Session
from comfyfleet.worker.agent.startup import Startup
from comfyfleet.worker.agent.tickets import TicketChecker
from comfyfleet.worker.api.generate import ClientGone, GenerateRoutes, live_view, plain_id, read_body
from comfyfleet.worker.job import Job
from comfyfleet.worker.service import JobService

log = structlog.get_logger()

GENERATE_PATHS = ("/generate", "/generate/sync", "/generate/stream")
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class TicketedServer:
    """An ASGI application. `run` closes expired sessions."""

    def __init__(
        self,
        *,
        service: JobService,
        routes: GenerateRoutes,
        sessions: SessionRoutes,
        book: LoadBook,
        startup: Startup,
        clock: Clock,
        on_change: Callable[[], None],
        on_success: Callable[[Job], None],
        output_dir: Path,
        max_body_bytes: int,
    ) -> None:
        self._output_dir = output_dir
        self._service = service
        self._routes = routes
        self._sessions = sessions
        self._book = book
        self._startup = startup
        self._clock = clock
        self._on_change = on_change
        self._on_success = on_success
        self._max_body_bytes = max_body_bytes
        self._tickets: TicketChecker | None = None
        self._followed: set[Job] = set()

    async def side(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The plain side port: `/session/end` and nothing else, for a webhook on this machine."""
        if scope["type"] == "http":
            if scope["path"] == "/session/end":
                await self(scope, receive, send)
            else:
                await worker_error(NotFound("there is no such route"))(scope, receive, send)

    def admit(self, tickets: TicketChecker) -> None:
        """From now on tickets can be checked: the control plane's key has arrived."""
        self._tickets = tickets

    async def run(self) -> None:
        await self._sessions.close_expired()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            await self._dispatch(scope, receive, send)
        except FleetError as error:
            await worker_error(error)(scope, receive, send)
        except ClientGone:
            return
        except Exception:  # the request boundary
            log.exception("ticketed_request.crashed", path=scope["path"])
            await worker_error(FleetError("internal error"))(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if method == "GET" and path == "/health":
            is_ready = self._startup.loadtime_s > 0 and not self._startup.error and self._service.is_ready
            body = {"status": "ready" if is_ready else "not ready", "stage": self._startup.stage.value}
            await JsonResponse(body, status_code=200 if is_ready else 503)(scope, receive, send)
            return
        if method != "POST":
            raise NotFound("there is no such route")
        headers = Headers(scope=scope)
        call = _call(await read_body(receive, headers, self._max_body_bytes))
        if path in GENERATE_PATHS:
            await self._generate(path, call, headers, scope, receive, send)
        elif path.startswith("/session/"):
            try:
                response = await self._sessions.answer(path, call, self._checker())
            finally:
                self._on_change()  # a refusal is news too
            await response(scope, receive, send)
        else:
            claims = self._checker().verify(_object(call, "auth_data"))
            await self._answer_holder(path, claims, headers)(scope, receive, send)

    def _checker(self) -> TicketChecker:
        if self._tickets is None:
            raise Unavailable("this worker has not yet got its control plane's key", retry_after_s=2.0)
        return self._tickets

    async def _generate(
        self, path: str, call: Mapping[str, Any], headers: Headers, scope: Scope, receive: Receive, send: Send
    ) -> None:
        auth_data = _object(call, "auth_data")
        checker = self._checker()
        try:
            payload = _object(call, "payload")
        except Unprocessable:
            checker.verify(auth_data)  # whoever holds no good ticket is told just that
            raise
        session_id = call.get("session_id")
        session: Session | None = None
        if session_id is not None:
            session = self._sessions.table.use(str(session_id), auth_data, self._clock.now())
            self._sessions.job_began(session)  # a session that is closed from here on has this job still to do
            claims = session.claims
        else:
            claims = checker.consume(auth_data)
        request = GenerateInput()
        try:
            request = parse_payload(payload)
            job = await self._service.submit(
                request,
                scope=claims.sub,
                key="" if session else job_key(claims),
                abandonable=path != "/generate",
            )
        except FleetError as refusal:
            if session is None:
                self._book.reject(request_idx=claims.request_idx, cost=claims.cost, now=self._clock.now())
            else:
                self._sessions.job_ended(session)
            self._on_change()
            await worker_error(refusal, request_id=plain_id(request))(scope, receive, send)
            return
        except BaseException:
            if session is not None:
                self._sessions.job_ended(session)
            raise
        if session is None:
            self._follow(job, claims)
        else:
            job.when_ended(partial(self._session_job_ended, session))
        if path == "/generate/sync":
            await self._routes.answer_sync(job, headers, scope, receive, send)
        elif path == "/generate/stream":
            await self._routes.follow(job, headers)(scope, receive, send)
        else:
            await self._routes.answer_accepted(job, headers)(scope, receive, send)

    def _follow(self, job: Job, claims: TicketClaims) -> None:
        """Book the job's cost until its end. A repeat that joined a followed job is already booked."""
        if job in self._followed:
            return
        self._book.begin(reqnum=claims.reqnum, request_idx=claims.request_idx, cost=claims.cost, now=self._clock.now())
        self._on_change()
        self._followed.add(job)
        job.when_ended(partial(self._job_ended, claims.reqnum, job.is_final))

    def _session_job_ended(self, session: Session, _job: Job) -> None:
        self._sessions.job_ended(session)
        self._on_change()

    def _job_ended(self, reqnum: int, is_replay: bool, job: Job) -> None:
        self._followed.discard(job)
        http_status = job.finished.http_status if job.finished else 503
        status = {200: "Success", 499: "Cancelled"}.get(http_status, "Error")
        run = RunFacts(
            started_at=job.stamps.get(RunStatus.GENERATING, 0.0),
            seconds=0.0 if is_replay else job.engine_s or 0.0,
            shape=job.shape,
            loaded=job.loaded,
        )
        self._book.end(reqnum=reqnum, status=status, now=self._clock.now(), run=run)
        if status == "Success":
            self._on_success(job)
        self._on_change()

    def _answer_holder(self, path: str, claims: TicketClaims, headers: Headers) -> Callable[..., Awaitable[None]]:
        """Routes for whoever holds the ticket a job was started with, or another of the same key."""
        kind, _, rest = path.strip("/").partition("/")
        if path == "/progress":
            return StreamingResponse(self._progress(claims), media_type="text/event-stream")
        job_id, _, name = rest.partition("/")
        if kind not in ("result", "cancel", "files") or not job_id or bool(name) != (kind == "files"):
            raise NotFound("there is no such route")
        job = self._service.get(job_id, scope=claims.sub)
        if kind == "files":
            return self._output_file(job, name)
        if kind == "cancel":
            return _Cancelling(self._service, job, claims.sub)
        if "text/event-stream" in headers.get("accept", ""):
            return self._routes.follow(job, headers)
        return self._routes.answer_accepted(job, headers)

    def _output_file(self, job: Job, name: str) -> FileResponse:
        folder = (self._output_dir / job.folder).resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise NotFound("this job has no such output", request_id=job.id)
        return FileResponse(path)

    async def _progress(self, claims: TicketClaims) -> AsyncIterator[bytes]:
        """Snapshots {status, message, percentage} until the job ends. Following does not keep a job alive."""
        job = self._service.by_key(claims.sub, job_key(claims))
        if job is None:
            return
        percentage = 0.0
        async for event in self._service.events(job):
            if event.progress is not None:
                percentage = event.progress
            if event.status in (RunStatus.GENERATED, RunStatus.COMPLETED):
                percentage = 100.0
            snapshot = {"status": event.status.value, "message": event.message, "percentage": percentage}
            yield sse_frame(_encode(snapshot))


class _Cancelling:
    """Cancel, then answer with the job as it is."""

    def __init__(self, service: JobService, job: Job, scope: str) -> None:
        self._service = service
        self._job = job
        self._scope = scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = await self._service.cancel(self._job.id, scope=self._scope)
        body = {**live_view(self._service, job), "cancelled": job.status == "cancelled"}
        response: Response = JsonResponse(body)
        await response(scope, receive, send)


def job_key(claims: TicketClaims) -> str:
    """What names a routed job that brought no request_id: its number at its endpoint."""
    return f"{claims.endpoint}:{claims.request_idx}"


def _call(body: bytes) -> Mapping[str, Any]:
    try:
        call = _decode(body)
    except NOT_JSON as error:
        raise Unprocessable(f"the body is not valid JSON: {error}", field="body") from error
    if not isinstance(call, Mapping):
        raise Unprocessable("the body must be an object", field="body")
    return call


def _object(call: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = call.get(name)
    if value is None:
        # Without a ticket nothing is told about the rest: an anonymous caller gets 401, whatever the body.
        if name == "auth_data":
            raise Unauthorized("a ticket is needed: auth_data is missing", reason="no_ticket")
        raise Unprocessable(f"{name} is missing", field=name)
    if not isinstance(value, Mapping):
        raise Unprocessable(f"{name} must be an object", field=name)
    return value

"""The hot path: `/generate`, `/generate/sync`, `/generate/stream`, and a result followed as a stream. Plain ASGI.

Documented in the OpenAPI by `app`; kept off FastAPI's machinery because `/generate/sync` may add three milliseconds to
the engine's own time, and no more.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import structlog
from anyio.lowlevel import checkpoint
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from comfyfleet.clock import Clock
from comfyfleet.web import JsonResponse, sse_frame, worker_error
from comfyfleet.wire.errors import FleetError, PayloadTooLarge
from comfyfleet.wire.generation import REQUEST_ID, GenerateInput
from comfyfleet.worker.api.bodies import parse_body
from comfyfleet.worker.job import Finished, Job, RunEvent
from comfyfleet.worker.service import JobService

log = structlog.get_logger()

_PING_S = 15.0
_LOOK_AFTER_S = 0.25
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_FALSE = ("0", "false", "no", "off", "")


class GenerateRoutes:
    """The three POST routes as one ASGI app, by path."""

    def __init__(self, service: JobService, clock: Clock, *, max_body_bytes: int, include_response: bool) -> None:
        self._service = service
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._include_response = include_response
        self.paths = {
            "/generate": self._accept,
            "/generate/sync": self._sync,
            "/generate/stream": self._stream,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = GenerateInput()
        try:
            headers = Headers(scope=scope)
            request = parse_body(await read_body(receive, headers, self._max_body_bytes))
            if headers.get("x-return-outputs-as-base64", "0").lower() not in _FALSE:
                request = msgspec.structs.replace(request, return_outputs_as_base64=True)
            await self.paths[scope["path"]](request, headers, scope, receive, send)
        except FleetError as error:
            await worker_error(error, request_id=plain_id(request))(scope, receive, send)
        except ClientGone:
            return
        except Exception:  # the request boundary
            log.exception("request.crashed", path=scope["path"])
            await worker_error(FleetError("internal error"))(scope, receive, send)

    async def _accept(
        self, request: GenerateInput, headers: Headers, scope: Scope, receive: Receive, send: Send
    ) -> None:
        job = await self._service.submit(request)
        await self.answer_accepted(job, headers)(scope, receive, send)

    async def _sync(self, request: GenerateInput, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        job = await self._service.submit(request, abandonable=True)
        await self.answer_sync(job, headers, scope, receive, send)

    async def answer_sync(self, job: Job, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the job and answer; a caller that hangs up stops waiting, the job is the service's business."""
        finished = job.finished
        if finished is None:
            await checkpoint()  # the job's task goes first: what is set up here to wait for it takes a moment
            # Most short jobs end before anybody need look whether the caller is still there.
            with anyio.move_on_after(_LOOK_AFTER_S):
                finished = await self._service.wait(job)
        if finished is None:
            async with anyio.create_task_group() as racers:
                racers.start_soon(_until_disconnect, receive, racers.cancel_scope)
                finished = await self._service.wait(job)
                # Answered in here: ending the race first would keep the caller waiting for it.
                await result_response(finished, full=self.wants_full(headers))(scope, receive, send)
                racers.cancel_scope.cancel()
            return
        await result_response(finished, full=self.wants_full(headers))(scope, receive, send)

    def answer_accepted(self, job: Job, headers: Headers) -> Response:
        """202 and how far the job is, or its result."""
        if job.finished is not None:
            return result_response(job.finished, full=self.wants_full(headers))
        return JsonResponse(live_view(self._service, job), status_code=202)

    async def _stream(
        self, request: GenerateInput, headers: Headers, scope: Scope, receive: Receive, send: Send
    ) -> None:
        job = await self._service.submit(request, abandonable=True)
        await self.follow(job, headers)(scope, receive, send)

    def follow(self, job: Job, headers: Headers) -> StreamingResponse:
        """The job's log as server-sent events, from after `Last-Event-ID`, the result last.

        `X-Include-Previews: 1` puts the latest small picture into progress frames, where the engine makes any.
        """
        last = headers.get("last-event-id", "")
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else 0
        return StreamingResponse(
            self._frames(job, after, self.wants_full(headers), headers.get("x-include-previews", "0") not in _FALSE),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _frames(self, job: Job, after: int, full: bool, previews: bool) -> AsyncIterator[bytes]:
        job.callers += 1
        try:
            while not job.events.is_read(after):
                events = await job.events.more(after, _PING_S)
                if not events and not job.events.closed:
                    # A node may be at it for long without a word; whoever follows is to know that we are alive.
                    yield b": still here\n\n"
                for event in events:
                    after = event.number
                    frame = self._frame(job, event)
                    watch = job.watch
                    if previews and event.progress is not None and watch is not None and watch.preview is not None:
                        picture = watch.preview
                        frame["preview"] = f"data:{picture.mime};base64,{b64encode(picture.data).decode()}"
                    yield sse_frame(_encode(frame), event_id=str(event.number))
            await job.done.wait()
            if job.finished is not None:
                result = {"status": "final_result", "result": msgspec.Raw(slimmed(job.finished.body, full))}
                yield sse_frame(_encode(result))
        finally:
            self._service.hung_up(job)

    def _frame(self, job: Job, event: RunEvent) -> dict[str, Any]:
        view = self._service.queue_view(job)
        frame: dict[str, Any] = {
            "id": job.id,
            "status": event.status.value,
            "message": event.message,
            "timestamp": event.at,
            "elapsed_time": round(event.at - job.accepted_at, 3),
            "queue_position": {"position": view.position, "eta_s": view.eta_s},
            "queue_info": {"waiting": view.waiting, "generating": view.generating, "storing": view.storing},
        }
        if event.progress is not None:
            frame["progress"] = {
                "percentage": event.progress,
                "node": event.node,
                "value": event.step,
                "max": event.steps,
            }
        return frame

    def wants_full(self, headers: Headers) -> bool:
        """With ComfyUI's own words or without."""
        asked = headers.get("x-include-comfyui-response")
        return self._include_response if asked is None else asked.lower() not in _FALSE


def plain_id(request: GenerateInput) -> str:
    """The id that a refusal is answered under: the caller's own, unless that is what is refused."""
    return request.request_id if REQUEST_ID.fullmatch(request.request_id) else ""


class ClientGone(Exception):
    """The caller hung up while its body was read."""


async def read_body(receive: Receive, headers: Headers, limit: int) -> bytes:
    """The whole body. Raises PayloadTooLarge before reading more than `limit`, or ClientGone."""
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise PayloadTooLarge(f"the body has {length} bytes, the limit is {limit}")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise PayloadTooLarge(f"the body has over {limit} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts) if len(parts) > 1 else part


async def _until_disconnect(receive: Receive, race: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    race.cancel()


def result_response(finished: Finished, *, full: bool) -> Response:
    """A finished job's answer; HTTP mirrors the result."""
    headers = {} if finished.retry_after_s is None else {"Retry-After": str(max(1, round(finished.retry_after_s)))}
    return Response(slimmed(finished.body, full), finished.http_status, media_type="application/json", headers=headers)


def slimmed(body: bytes, full: bool) -> bytes:
    """The result, without ComfyUI's own words where they were not asked for."""
    if full:
        return body
    result = _decode(body)
    result["comfyui_response"] = {}
    return _encode(result)


def live_view(service: JobService, job: Job) -> dict[str, Any]:
    """The result shape of a job that has no result yet."""
    view = service.queue_view(job)
    last = job.events.events[-1] if job.events.events else None
    return {
        "id": job.id,
        "message": last.message if last else "",
        "status": job.status.value,
        "comfyui_response": {},
        "output": [],
        "timings": {"queued_at_ms": int(job.accepted_at * 1000)},
        "miniature": False,
        "queue_position": {"position": view.position, "eta_s": view.eta_s},
        "progress": None if last is None else last.progress,
    }

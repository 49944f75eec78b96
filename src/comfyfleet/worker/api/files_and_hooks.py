"""The wrapper's routes beside jobs: `POST /upload`, and the webhooks' delivery log, dead letters, replay and test."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from comfyfleet.web import NOT_JSON, JsonResponse
from comfyfleet.webhooks.outbox import EventState, OutgoingEvent
from comfyfleet.wire.errors import BadRequest
from comfyfleet.wire.generation import WebhookTarget
from comfyfleet.worker.api.upload import Upload
from comfyfleet.worker.stages.kit import Kit

_UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
        }
    },
}
_TEST_BODY = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"url": {"type": "string"}, "secret": {"type": "string"}, "timeout": {"type": "number"}},
            }
        }
    }
}
_MAX_TEST_BODY = 64 * 1024
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "Not the shape asked for."},
    413: {"description": "Too large."},
    422: {"description": "Understood, and no retry can help."},
}


def routes(kit: Kit, *, upload_max_bytes: int) -> APIRouter:
    """The routes over one worker's kit.

    The wrapper's port is the operator's, so its log holds every event of this worker: those of jobs that came in behind
    a ticket too, which nobody else could find or tell again. Bodies, URLs and secrets are shown to nobody.
    """
    router = APIRouter()

    @router.post(
        "/upload",
        summary="Store files for later jobs, by content",
        responses=_REFUSALS,
        openapi_extra={"requestBody": _UPLOAD_BODY},
    )
    async def upload(request: Request) -> Response:
        taking = Upload(kit.inputs, max_bytes=upload_max_bytes)
        try:
            files = await taking.receive(request.stream(), request.headers.get("content-type", ""))
        except ClientDisconnect as problem:
            raise BadRequest("the caller hung up in the middle of its upload") from problem
        first = msgspec.to_builtins(files[0])
        return JsonResponse({**first, "files": files})

    @router.get("/webhooks", summary="Webhook events: waiting, delivered or dead, with every attempt")
    async def events(
        job: Annotated[str, Query(max_length=200)] = "",
        state: EventState | None = None,
        scope: Annotated[str | None, Query(max_length=200, description="Only of jobs sent under this key.")] = None,
    ) -> Response:
        found = await kit.notify.webhooks.events(scope=scope, job=job, state=state)
        attempts = await kit.notify.webhooks.deliveries([event.id for event in found])
        return JsonResponse(
            [{**_shown(event), "deliveries": [one for one in attempts if one.event_id == event.id]} for event in found]
        )

    @router.post("/webhooks/{event_id}/replay", summary="Tell an event again, under the same id", status_code=202)
    async def replay(event_id: str) -> Response:
        await kit.notify.webhooks.replay(event_id, scope=None)
        return JsonResponse({"id": event_id, "state": "waiting"}, status_code=202)

    @router.post(
        "/webhooks/test",
        summary="Post a sample to a webhook now and say what happened",
        responses=_REFUSALS,
        openapi_extra={"requestBody": _TEST_BODY},
    )
    async def test(request: Request) -> Response:
        target = await _target(request)
        kit.notify.check(target)
        return JsonResponse(await kit.notify.test(target))

    return router


async def _target(request: Request) -> WebhookTarget:
    """The body's receiver; none at all means the operator's. Raises BadRequest."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_TEST_BODY:
            raise BadRequest("the body is too long")
    try:
        return msgspec.json.decode(body, type=WebhookTarget) if body.strip() else WebhookTarget()
    except NOT_JSON as problem:
        raise BadRequest(f"not a webhook: {problem}") from problem


def _shown(event: OutgoingEvent) -> dict[str, Any]:
    """An event for its owner: where to only by host, and no body."""
    return {
        "id": event.id,
        "job": event.job,
        "scope": event.scope,
        "event": event.event,
        "host": event.host,
        "state": event.state.value,
        "attempts": event.attempts,
        "created_at": event.created_at,
        "next_at": event.next_at if event.state is EventState.WAITING else None,
        "ended_at": event.ended_at,
        "reason": event.reason,
    }

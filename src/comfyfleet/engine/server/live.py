"""`/ws`: one socket, its greeting, its features, and its outbox written out at the reader's own pace."""

from __future__ import annotations

import anyio
import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from comfyfleet.engine.server.engine import Engine
from comfyfleet.engine.server.routes import FEATURES
from comfyfleet.engine.server.sockets import TOO_SLOW, Outbox, message


def engine_of(connection: HTTPConnection) -> Engine:
    engine: Engine = connection.app.state.engine
    return engine


async def ws(socket: WebSocket) -> None:
    engine = engine_of(socket)
    client_id = socket.query_params.get("clientId") or engine.ids.request_id().replace("-", "")
    await socket.accept()
    outbox = Outbox()
    engine.hub.join(client_id, outbox)
    outbox.put("status", message("status", {"status": engine.status(), "sid": client_id}))
    if (node := engine.current_node(client_id)) is not None:
        outbox.put("executing", message("executing", {"node": node}))
    try:
        async with anyio.create_task_group() as both:

            async def hear() -> None:
                await _hear(socket, outbox)
                both.cancel_scope.cancel()

            both.start_soon(hear, name="hear socket")
            await _write(socket, outbox)
            both.cancel_scope.cancel()
    finally:
        engine.hub.leave(client_id, outbox)


async def no_upgrade(request: Request) -> Response:
    """A plain GET of the socket's path."""
    return PlainTextResponse("This path speaks WebSocket only: ask for an upgrade.", 400)


async def _write(socket: WebSocket, outbox: Outbox) -> None:
    try:
        while (frame := await outbox.take()) is not None:
            if isinstance(frame, str):
                await socket.send_text(frame)
            else:
                await socket.send_bytes(frame)
        await socket.close(TOO_SLOW, "messages were not read")
    except (WebSocketDisconnect, RuntimeError):
        return  # gone while we wrote


async def _hear(socket: WebSocket, outbox: Outbox) -> None:
    """Only the first object that can be parsed may announce features; everything else means nothing."""
    is_first = True
    while True:
        received = await socket.receive()
        if received["type"] == "websocket.disconnect":
            return
        try:
            given = msgspec.json.decode(received.get("text") or received.get("bytes") or b"")
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            continue
        if not isinstance(given, dict):
            continue
        if is_first and given.get("type") == "feature_flags":
            features = given.get("data")
            outbox.features = features if isinstance(features, dict) else {}
            outbox.put("feature_flags", message("feature_flags", FEATURES))
        is_first = False

"""The engine's Starlette app: routes at the root and under /api, the engine's loop, and who may call.

A page in a browser must not drive an engine on the loopback interface, so a request whose Origin is not its Host is
refused there, as ComfyUI does. Bound anywhere else the engine has no protection: put a worker in front of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from comfyfleet.clock import Clock
from comfyfleet.engine.graph import PromptRefused
from comfyfleet.engine.render.setup import RenderSettings
from comfyfleet.engine.server import files, inside, routes, userdata
from comfyfleet.engine.server.answers import MAX_BODY_BYTES, TooLarge, refusal
from comfyfleet.engine.server.engine import Engine
from comfyfleet.engine.server.live import no_upgrade, ws
from comfyfleet.ids import Ids

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def build(settings: RenderSettings, clock: Clock, ids: Ids, give_up: Callable[[str], None]) -> Starlette:
    """The app; its lifespan runs the engine and ends its render process. `give_up` is told why none can start."""

    async def run(engine: Engine) -> None:
        give_up(await engine.run())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine = app.state.engine = Engine(settings, clock, ids)
        engine.folders.sweep()
        async with anyio.create_task_group() as loops:
            loops.start_soon(run, engine, name="engine")
            yield
            loops.cancel_scope.cancel()

    both = [
        *routes.ROUTES,
        *files.ROUTES,
        *userdata.ROUTES,
        *inside.ROUTES,
        WebSocketRoute("/ws", ws),
        Route("/ws", no_upgrade),
    ]
    app = Starlette(
        routes=[*both, Mount("/api", routes=both)],
        lifespan=lifespan,
        exception_handlers={PromptRefused: _refused, TooLarge: _too_large},
    )
    app.add_middleware(SameOrigin)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, PromptRefused)  # noqa: S101 - registered for this class
    return refusal(error)


async def _too_large(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"Maximum request body size {MAX_BODY_BYTES} exceeded.", 413)


class SameOrigin:
    """Refuses, with 403, what a foreign page sends to a loopback address; answers OPTIONS without CORS headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
            if is_foreign(host, origin):
                await self._refuse(scope, receive, send)
                return
            if scope["type"] == "http" and scope["method"] == "OPTIONS":
                await Response(status_code=200)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before accept: the upgrade is answered with 403
        else:
            await Response(status_code=403)(scope, receive, send)


def is_foreign(host: str, origin: str) -> bool:
    """True when both are given, Host is a loopback name, and Origin is another place."""
    if not host or not origin:
        return False
    here, there = urlsplit(f"//{host}"), urlsplit(origin)
    if (here.hostname or "") not in LOOPBACK:
        return False
    try:
        return (here.hostname, here.port) != (there.hostname, there.port)
    except ValueError:
        return True  # a port that is no number

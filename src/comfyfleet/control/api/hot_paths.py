"""The few paths that carry the load, found by one look-up in front of the app's middleware and its list of routes.

What is not among them, or asked with another method, goes the app's way; so does nothing that needs a path parameter.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from comfyfleet.control.api.calling import error_response

Handler = Callable[[Request], Awaitable[Response]]


def posts(routes: Iterable[BaseRoute]) -> dict[tuple[str, str], Handler]:
    """The handlers of what is posted to a fixed path."""
    return {
        ("POST", route.path): route.endpoint
        for route in routes
        if isinstance(route, Route) and "POST" in (route.methods or ()) and not route.param_convertors
    }


class HotPaths:
    """An app in front of an app. handlers: by method and exact path."""

    def __init__(self, app: ASGIApp, handlers: Mapping[tuple[str, str], Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except ClientDisconnect:  # nobody reads an answer
            return
        except Exception as error:  # the request boundary
            response = await error_response(request, error)
        await response(scope, receive, send)

"""Serve one ASGI application inside a task group: uvicorn without its hold on the process's signals."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp


class _QuietServer(uvicorn.Server):
    """Signals belong to the process's composition root."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket to serve on. Raises OSError when the port is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Until cancelled."""
    config = uvicorn.Config(
        app, interface="asgi3", log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75
    )
    await _QuietServer(config).serve(sockets=[listener])

"""Sockets and servers for every role: uvicorn without its hold on the process's signals.

Signals belong to a composition root, which has loops to end as well as a server. No routes and no settings here.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

import anyio
import uvicorn
from starlette.types import ASGIApp

from comfyfleet.wire.errors import FleetError


class CannotListen(FleetError):
    """This address cannot be listened on: taken, not of this machine, or no address at all."""

    code, status = "cannot_listen", 409


class QuietServer(uvicorn.Server):
    """Runs until cancelled or until `should_exit` is set; never touches a signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket to serve on. Raises CannotListen, saying why."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as problem:  # taken or foreign; no port; no host name
        listener.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {getattr(problem, 'strerror', problem)}") from problem
    return listener


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    """One more application inside a task group, until cancelled."""
    config = uvicorn.Config(
        app, interface="asgi3", log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75
    )
    await QuietServer(config).serve(sockets=[listener])


async def stop_on_signal(server: uvicorn.Server) -> None:
    """The first SIGINT or SIGTERM ends the server in order, the second at once."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            server.force_exit = server.should_exit
            server.should_exit = True

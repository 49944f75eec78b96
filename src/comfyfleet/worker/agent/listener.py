"""Serve one ASGI application inside a task group: uvicorn without its hold on the process's signals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp


class _QuietServer(uvicorn.Server):
    """Signals belong to the process's composition root."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app: ASGIApp, host: str, port: int) -> None:
    """Until cancelled; raises SystemExit-free OSError when the port is taken."""
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75
    )
    await _QuietServer(config).serve()

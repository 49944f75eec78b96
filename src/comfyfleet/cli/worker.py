"""`comfyfleet worker`: read the environment, build the worker, run it until a signal."""

from __future__ import annotations

import os

import anyio
import click
import structlog

from comfyfleet import logs
from comfyfleet.cli.values import PORT
from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.settings.worker import from_environment
from comfyfleet.worker import app

log = structlog.get_logger()


@click.command()
@click.option("--standalone", is_flag=True, help="The API wrapper alone: no fleet, whatever the environment says.")
@click.option(
    "--host", help="Where the wrapper listens (default 127.0.0.1; anywhere else needs COMFYFLEET_WORKER_KEY)."
)
@click.option("--port", type=PORT, help="The wrapper's port (default 18288).")
@click.option("--engine-port", type=PORT, help="Port of the first engine that is started (default 18188).")
@click.option("--data-dir", help="Models, outputs and the journal (default ~/.local/share/comfyfleet).")
@click.option("--backends", help="Base URLs of engines that run already, comma-separated.")
def command(
    standalone: bool,
    host: str | None,
    port: int | None,
    engine_port: int | None,
    data_dir: str | None,
    backends: str | None,
) -> None:
    """Run one worker: engines, the wrapper on 18288, and the agent when a fleet is named."""
    env = dict(os.environ)
    for name, value in (
        ("COMFYFLEET_WRAPPER_HOST", host),
        ("COMFYFLEET_WRAPPER_PORT", port),
        ("COMFYFLEET_ENGINE_PORT", engine_port),
        ("COMFYFLEET_DATA_DIR", data_dir),
        ("COMFYUI_BACKENDS", backends),
    ):
        if value is not None:
            env[name] = str(value)
    if standalone:
        env.pop("REPORT_ADDR", None)
    settings = from_environment(env)
    logs.configure(level=settings.log_level)
    named = env.get("COMFYUI_INSTALL_PATH")
    if named and settings.engines.install_path is None and not settings.engines.backends:
        log.warning("comfyui.not_found", path=named, instead="the embedded engine")

    async def run() -> None:
        await app.serve(settings, env, clock=SystemClock(), ids=SystemIds())

    anyio.run(run, backend_options={"use_uvloop": True})

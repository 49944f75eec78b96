"""`comfyfleet control`: run the control plane."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import anyio
import click

from comfyfleet import logs
from comfyfleet.cli.values import PORT
from comfyfleet.control.app import listen, serve
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.settings.control import DEFAULT_PORT, control_settings


@click.command()
@click.option("--host", help="Address to listen on; loopback unless told otherwise.")
@click.option("--port", type=PORT, help=f"Port; {DEFAULT_PORT} unless told otherwise, 0 takes a free one.")
@click.option("--fd", type=int, help="An inherited listening socket, instead of host and port.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keys, database and files.")
@click.option(
    "--fleet", type=click.Choice(["local", "ray", "none"]), help="Who starts workers: this machine, Ray, or nobody."
)
@click.option("--ray-address", help="host:port of the Ray head, for --fleet ray.")
@click.option("--database", help="postgresql://… instead of the SQLite file in the data directory.")
@click.option("--max-workers", type=click.IntRange(min=0), help="At most so many workers on this machine.")
@click.option("--public-url", help="How workers and callers reach this control plane.")
@click.option("--advertise-url", help="How the other control planes of a shared database reach this one.")
@click.option("--report-url", help="Where workers report, if elsewhere; several separated by commas.")
@click.option("--tls-cert", type=click.Path(path_type=Path, exists=True), help="PEM certificate chain.")
@click.option("--tls-key", type=click.Path(path_type=Path, exists=True), help="PEM private key.")
def command(**given: object) -> None:
    """Run the control plane: endpoints, routing, durable jobs, scaling."""
    try:
        settings = control_settings(os.environ, **given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    logs.configure(level=settings.log_level)
    if settings.tls_cert is not None:
        _check_tls(settings.tls_cert, settings.tls_key)
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    settings = control_settings(os.environ, **{**given, "host": host, "port": port})
    try:
        with listener:
            anyio.run(serve, settings, listener, backend_options={"use_uvloop": True})
    except ConnectionLost as error:
        raise click.ClickException(str(error)) from error


def _check_tls(cert: Path, key: Path | None) -> None:
    """Raises UsageError unless the files hold a certificate and its key: a server would tell it by a traceback."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except OSError as error:
        raise click.UsageError(f"--tls-cert and --tls-key hold no certificate with its key: {error}") from error

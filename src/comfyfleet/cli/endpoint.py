"""`comfyfleet endpoint`: endpoints, their workers, logs and scaling decisions."""

from __future__ import annotations

from typing import Any

import click

from comfyfleet.cli.asking import Asking, asking, printable, show, show_table
from comfyfleet.cli.values import AMOUNT, COUNT, FINITE

_COLUMNS = (
    "id",
    "endpoint_name",
    "endpoint_state",
    "cold_workers",
    "max_workers",
    "min_load",
    "target_util",
    "cold_mult",
)


def settings(command: Any) -> Any:
    """The options that `create` and `update` share."""
    for name, kind in (
        ("cold-workers", COUNT),
        ("max-workers", COUNT),
        ("min-load", AMOUNT),
        ("min-cold-load", AMOUNT),
        ("target-util", AMOUNT),
        ("cold-mult", AMOUNT),
        ("max-queue-time", AMOUNT),
        ("target-queue-time", AMOUNT),
        ("inactivity-timeout", FINITE),  # below 0: never to zero
    ):
        command = click.option(f"--{name}", type=kind)(command)
    return command


def endpoint_id(ask: Asking, name: str) -> int:
    """An endpoint's id, by name or id. Raises a usage error for one that is not there."""
    for row in ask("GET", "/api/v0/endptjobs/")["results"]:
        if name in (row["endpoint_name"], str(row["id"])):
            return int(row["id"])
    raise click.UsageError(f"there is no endpoint {name!r}")


@click.group()
def command() -> None:
    """Endpoints: a name to route to, and how its fleet scales."""


@command.command("list")
@asking
def list_endpoints(ask: Asking) -> None:
    """Every endpoint this key may see."""
    rows = ask("GET", "/api/v0/endptjobs/")["results"]
    show(rows) if ask.is_raw else show_table(rows, _COLUMNS)


@command.command("create")
@click.argument("name")
@settings
@asking
def create_endpoint(ask: Asking, name: str, **values: Any) -> None:
    """Make an endpoint. What is not given has the documented default."""
    made = ask("POST", "/api/v0/endptjobs/", {"endpoint_name": name, **values})
    show(made) if ask.is_raw else click.echo(f"endpoint {made['result']} created; next: comfyfleet workergroup create")


@command.command("update")
@click.argument("name")
@click.option("--state", "endpoint_state", type=click.Choice(["active", "suspended", "stopped"]))
@click.option("--rename", "endpoint_name")
@settings
@asking
def update_endpoint(ask: Asking, name: str, **values: Any) -> None:
    """Change what is given, leave the rest."""
    changed = ask("PUT", f"/api/v0/endptjobs/{endpoint_id(ask, name)}/", values)["result"]
    show(changed) if ask.is_raw else show_table([changed], _COLUMNS)


@command.command("delete")
@click.argument("name")
@asking
def delete_endpoint(ask: Asking, name: str) -> None:
    """Delete it with its workergroups and workers. Running jobs end first."""
    click.echo(ask("DELETE", f"/api/v0/endptjobs/{endpoint_id(ask, name)}/")["msg"])


@command.command("workers")
@click.argument("name")
@asking
def list_workers(ask: Asking, name: str) -> None:
    """Its live workers."""
    rows = ask("POST", "/get_endpoint_workers/", {"id": endpoint_id(ask, name)})
    columns = ("id", "status", "measured_perf", "perf", "reqs_working", "gpu_name", "stage", "error_msg")
    show(rows) if ask.is_raw else show_table(rows, columns)


@command.command("logs")
@click.argument("name")
@click.option("--level", type=click.Choice(["info0", "info1", "trace", "debug"]), default="info1", show_default=True)
@click.option("--tail", type=COUNT, default=100, show_default=True)
@asking
def show_logs(ask: Asking, name: str, level: str, tail: int) -> None:
    """What happened to it, and why."""
    text = ask("POST", "/get_endpoint_logs/", {"id": endpoint_id(ask, name), "tail": tail})[level]
    click.echo("\n".join(map(printable, text.split("\n"))), nl=False)


@command.command("decisions")
@click.argument("name")
@click.option("--limit", type=COUNT, default=20, show_default=True)
@asking
def list_decisions(ask: Asking, name: str, limit: int) -> None:
    """Why it scaled as it did, newest first."""
    rows = ask("GET", f"/v1/endpoints/{endpoint_id(ask, name)}/decisions?limit={limit}")["decisions"]
    show(rows) if ask.is_raw else show_table(rows, ("id", "at", "sentence"))


@command.command("rotate-key")
@click.argument("name")
@asking
def rotate_key(ask: Asking, name: str) -> None:
    """Give it a new key; the old one stops working."""
    click.echo(ask("POST", f"/v1/endpoints/{endpoint_id(ask, name)}/rotate-key")["api_key"])

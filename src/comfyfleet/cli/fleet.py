"""`comfyfleet fleet`: machines, the workers on them, and what happened to them."""

from __future__ import annotations

from typing import Any

import click

from comfyfleet.cli.asking import Asking, asking, printable, show, show_table


@click.group()
def command() -> None:
    """Machines: what there is, what runs where, what happened."""


@command.command("nodes")
@asking
def list_nodes(ask: Asking) -> None:
    """The machines that workers run on."""
    answer = ask("GET", "/v1/fleet/nodes")
    columns = ("name", "address", "state", "gpus", "free_gpus", "gpu_name", "gpu_ram_gb", "price_hour", "workers")
    _print(ask, answer, "nodes", columns)


@command.command("workers")
@asking
def list_workers(ask: Asking) -> None:
    """Workers by machine. What the fleet provider sees, and what the control plane knows."""
    columns = ("id", "presence", "status", "node", "url", "gpu_name", "price_hour", "started_at", "detail")
    _print(ask, ask("GET", "/v1/fleet/workers"), "workers", columns)


@command.command("events")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@asking
def list_events(ask: Asking, limit: int) -> None:
    """What happened lately, oldest first."""
    _print(ask, ask("GET", f"/v1/fleet/events?limit={limit}"), "events", ("at", "kind", "node", "worker_id", "text"))


def _print(ask: Asking, answer: dict[str, Any], name: str, columns: tuple[str, ...]) -> None:
    rows = answer[name]
    if ask.is_raw:
        show(answer)
        return
    for row in rows:
        if "is_alive" in row:
            row["state"] = "alive" if row["is_alive"] else "dead"
            row["workers"] = ", ".join(map(str, row["workers"])) or "-"
        if "at" in row:
            row["happened_at"] = row["at"]
    show_table(rows, tuple("happened_at" if column == "at" else column for column in columns))
    if trouble := answer.get("trouble"):
        click.echo(f"nothing new starts: {printable(trouble)}")

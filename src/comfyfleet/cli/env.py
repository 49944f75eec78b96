"""`comfyfleet env`: account variables, given to every worker that starts. Secret unless said otherwise."""

from __future__ import annotations

import sys
from urllib.parse import quote

import click

from comfyfleet.cli.asking import Asking, asking, show, show_table
from comfyfleet.cli.values import IDENTIFIER


@click.group()
def command() -> None:
    """Account variables. Their values are encrypted at rest; secret ones are never shown again."""


@command.command("list")
@asking
def list_variables(ask: Asking) -> None:
    """Names; values of those that are not secret."""
    rows = ask("GET", "/v1/env")["variables"]
    if ask.is_raw:
        show(rows)
        return
    show_table(
        [{**row, "value": "***" if row["is_secret"] else row["value"]} for row in rows], ("name", "value", "updated_at")
    )


@command.command("set")
@click.argument("assignments", nargs=-1, required=True)
@click.option("--plain", is_flag=True, help="Not a secret: the value may be shown.")
@asking
def set_variables(ask: Asking, assignments: tuple[str, ...], plain: bool) -> None:
    """Set NAME=VALUE, one or more. A NAME alone reads its value from standard input: no shell history keeps it."""
    for assignment in assignments:
        name, has_value, value = assignment.partition("=")
        IDENTIFIER.convert(name, None, None)
        if not has_value:
            value = sys.stdin.readline().rstrip("\n")
        ask("PUT", f"/v1/env/{quote(name, safe='')}", {"value": value, "is_secret": not plain})
        click.echo(f"{name} is set; workers that start from now on have it")


@command.command("unset")
@click.argument("names", nargs=-1, required=True, type=IDENTIFIER)
@asking
def unset_variables(ask: Asking, names: tuple[str, ...]) -> None:
    """Forget variables."""
    for name in names:
        ask("DELETE", f"/v1/env/{quote(name, safe='')}")
        click.echo(f"{name} is forgotten")

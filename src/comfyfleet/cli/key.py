"""`comfyfleet key`: API keys with scopes, endpoints, expiry and limits."""

from __future__ import annotations

from urllib.parse import quote

import click

from comfyfleet.cli.asking import Asking, asking, show, show_table
from comfyfleet.cli.values import AMOUNT, COUNT, IDENTIFIER, OVER_ZERO


@click.group()
def command() -> None:
    """API keys. Scopes: admin, manage, read, route, jobs."""


@command.command("list")
@asking
def list_keys(ask: Asking) -> None:
    """Every key, without the key itself."""
    keys = ask("GET", "/v1/keys")["keys"]
    show(keys) if ask.is_raw else show_table(keys, ("id", "name", "scopes", "endpoint_ids", "created_at", "expires_at"))


@command.command("create")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, default=("read", "route", "jobs"), show_default=True)
@click.option("--endpoint", "endpoints", multiple=True, help="Only this endpoint, by name; may be repeated.")
@click.option("--expires-in-days", type=OVER_ZERO, help="Until when it works.")
@click.option("--requests-per-s", type=AMOUNT, default=0.0, help="Rate limit; 0 is none.")
@click.option("--max-waiting-jobs", type=COUNT, default=0)
@click.option("--gpu-seconds-per-day", type=AMOUNT, default=0.0)
@click.option("--weight", type=OVER_ZERO, default=1.0, help="Its part where keys share a fleet.")
@asking
def create_key(
    ask: Asking,
    name: str,
    scopes: tuple[str, ...],
    endpoints: tuple[str, ...],
    expires_in_days: float | None,
    requests_per_s: float,
    max_waiting_jobs: int,
    gpu_seconds_per_day: float,
    weight: float,
) -> None:
    """Make a key; it is printed now and never again."""
    ids = {row["endpoint_name"]: row["id"] for row in ask("GET", "/api/v0/endptjobs/")["results"]} if endpoints else {}
    if unknown := [endpoint for endpoint in endpoints if endpoint not in ids]:
        raise click.UsageError(f"there is no endpoint {unknown[0]!r}")
    made = ask(
        "POST",
        "/v1/keys",
        {
            "name": name,
            "scopes": list(scopes),
            "endpoint_ids": [ids[endpoint] for endpoint in endpoints],
            "expires_in_s": None if expires_in_days is None else expires_in_days * 86_400,
            "limits": {
                "requests_per_s": requests_per_s,
                "max_waiting_jobs": max_waiting_jobs,
                "gpu_seconds_per_day": gpu_seconds_per_day,
                "weight": weight,
            },
        },
    )
    show(made) if ask.is_raw else click.echo(f"key {made['id']}: {made['key']}")


@command.command("revoke")
@click.argument("key_id", type=IDENTIFIER)
@asking
def revoke_key(ask: Asking, key_id: str) -> None:
    """End a key at once."""
    ask("DELETE", f"/v1/keys/{quote(key_id, safe='')}")
    click.echo(f"key {key_id} is revoked")

"""`comfyfleet workergroup`: what kind of workers an endpoint recruits."""

from __future__ import annotations

import click

from comfyfleet.cli.asking import Asking, asking, show, show_table
from comfyfleet.cli.endpoint import endpoint_id
from comfyfleet.cli.template import own_template
from comfyfleet.cli.values import AMOUNT, COUNT


@click.group()
def command() -> None:
    """Workergroups: template and hardware of an endpoint's workers."""


@command.command("list")
@asking
def list_workergroups(ask: Asking) -> None:
    """Every workergroup this key may see."""
    rows = ask("GET", "/api/v0/workergroups/")["results"]
    columns = ("id", "endpoint_name", "template_hash", "search_params", "gpu_ram", "is_updating")
    show(rows) if ask.is_raw else show_table(rows, columns)


@command.command("create")
@click.argument("endpoint")
@click.option("--template", default="local", show_default=True, help="Name, hash, or a TOML file.")
@click.option("--search-params", default="", help='Hardware, for example "gpu_ram>=24 num_gpus=1".')
@click.option("--gpu-ram", type=AMOUNT, help="GB that a new worker may have to download.")
@asking
def create_workergroup(ask: Asking, endpoint: str, template: str, search_params: str, gpu_ram: float | None) -> None:
    """Let an endpoint recruit workers of a template."""
    if own := own_template(template):
        template = ask("POST", "/api/v0/template/", own)["hash_id"]
    made = ask(
        "POST",
        "/api/v0/workergroups/",
        {
            "endpoint_id": endpoint_id(ask, endpoint),
            "template_hash": template,
            "search_params": search_params,
            "gpu_ram": gpu_ram,
        },
    )
    show(made) if ask.is_raw else click.echo(f"workergroup {made['id']} created")


@command.command("delete")
@click.argument("workergroup_id", type=COUNT)
@asking
def delete_workergroup(ask: Asking, workergroup_id: int) -> None:
    """Delete it; its workers drain and go."""
    click.echo(ask("DELETE", f"/api/v0/workergroups/{workergroup_id}/")["msg"])


@command.command("update-workers")
@click.argument("workergroup_id", type=COUNT)
@click.option("--cancel", is_flag=True, help="Call a running update off.")
@asking
def update_workers(ask: Asking, workergroup_id: int, cancel: bool) -> None:
    """Restart every worker, one by one. Each drains, and starts with the present template and variables."""
    answer = ask("POST", "/update_workers/", {"workergroup_id": workergroup_id, "cancel_update": cancel})
    click.echo("called off" if cancel else f"{answer['workers_to_update']} workers are updated in turn")

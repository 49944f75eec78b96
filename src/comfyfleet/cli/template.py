"""`comfyfleet template`: what a worker can be made of."""

from __future__ import annotations

import click

from comfyfleet.provision.template import shipped_templates


@click.group()
def command() -> None:
    """Templates: what a worker needs on disk."""


@command.command("list")
def list_templates() -> None:
    """Name, hash (what a workergroup's template_hash names) and description of each."""
    for template in shipped_templates():
        click.echo(f"{template.name:<12} {template.hash_id}  {template.description}")

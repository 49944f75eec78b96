"""`comfyfleet template`: what a worker can be made of."""

from __future__ import annotations

from pathlib import Path

import click

from comfyfleet.provision.template import find_template, shipped_templates


@click.group()
def command() -> None:
    """Templates: what a worker needs on disk."""


@command.command("list")
def list_templates() -> None:
    """Name, hash and description of each. The hash is what a workergroup's template_hash names."""
    for template in shipped_templates():
        click.echo(f"{template.name:<12} {template.hash_id}  {template.description}")


def own_template(name_or_file: str) -> dict[str, str] | None:
    """What a control plane is to know of a TOML file of the user's own, checked; None for a name or hash.

    Workers read the file itself, so it has to be at that place wherever one runs.
    """
    if not name_or_file.endswith(".toml"):
        return None
    template = find_template(name_or_file)
    template.benchmark_graph()
    return {
        "name": str(Path(name_or_file).resolve()),
        "desc": template.description,
        "env": template.docker_flags(),
    }

"""`comfyfleet provision TEMPLATE`: print what is to be done in steps and bytes, then do it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import click

from comfyfleet import logs
from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.provision.checkout import without_userinfo
from comfyfleet.provision.comfyui import REF, REPOSITORY, Install, install, prove
from comfyfleet.provision.progress import Progress, size
from comfyfleet.provision.provisioner import Provisioner, the_error_in
from comfyfleet.provision.template import CustomNode, Template, find_template
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.settings.machine import default_data_dir
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.wire.errors import FleetError

_SHOW_EVERY_S = 2.0


@click.command()
@click.argument("template")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Default: the data directory's models.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--path", type=click.Path(path_type=Path), help="comfyui: where (default the data directory's ComfyUI).")
@click.option("--nodes-of", help="comfyui: a template whose custom nodes are installed with it.")
@click.option("--no-check", is_flag=True, help="comfyui: do not start it to prove its nodes.")
def command(
    template: str, models_dir: Path | None, dry_run: bool, path: Path | None, nodes_of: str | None, no_check: bool
) -> None:
    """Download the models of TEMPLATE (name, hash or a TOML file), or install ComfyUI (the word `comfyui`)."""
    logs.configure(level="warning")
    if template == "comfyui":
        _comfyui(path, find_template(nodes_of).custom_nodes if nodes_of else (), dry_run=dry_run, no_check=no_check)
        return
    found = find_template(template)
    found.benchmark_graph()  # a plan that cannot be carried to a ready worker is told now
    folder = models_dir or default_models_dir()
    provisioner = Provisioner(
        settings=SourceSettings.from_environment(os.environ),
        models_dir=folder,
        clock=SystemClock(),
        ids=SystemIds(),
        limits=TransferLimits(),
        progress=Progress(),
    )
    anyio.run(_provision, provisioner, found, dry_run)


def _comfyui(path: Path | None, nodes: Sequence[CustomNode], *, dry_run: bool, no_check: bool) -> None:
    """An install that COMFYUI_INSTALL_PATH names is used as it is; another is made, and proved."""
    named = os.environ.get("COMFYUI_INSTALL_PATH", "")
    is_given = path is None and bool(named) and (Path(named).expanduser() / "main.py").is_file()
    folder = Path(named).expanduser() if is_given else path or default_data_dir(os.environ) / "ComfyUI"
    what = Install(
        path=folder.resolve(),
        repository=os.environ.get("COMFYFLEET_COMFYUI_REPO") or REPOSITORY,
        ref=os.environ.get("COMFYFLEET_COMFYUI_REF") or REF,
        custom_nodes=nodes,
    )
    if dry_run:
        click.echo(
            f"{'use' if is_given else f'install {without_userinfo(what.repository)} at {what.ref} in'} {what.path}"
        )
        for node in nodes:
            click.echo(f"custom node {without_userinfo(node.repository)} at {node.commit}")
        return
    if is_given:
        click.echo(f"{what.path} is used as it is")
    else:
        anyio.run(install, what, click.echo)
    if no_check:
        return
    proof = anyio.run(prove, what.path, what.custom_nodes, SystemClock())
    if proof.silent_nodes:
        raise click.ClickException(f"custom nodes that did not import: {', '.join(proof.silent_nodes)}")
    click.echo(f"{len(proof.classes)} node classes import; use it with COMFYUI_INSTALL_PATH={what.path}")


def default_models_dir() -> Path:
    """`COMFYUI_INSTALL_PATH/models` when a ComfyUI is there, else the data directory's."""
    install = Path(os.environ.get("COMFYUI_INSTALL_PATH") or "").expanduser()
    if os.environ.get("COMFYUI_INSTALL_PATH") and (install / "main.py").is_file():
        return install / "models"
    return default_data_dir(os.environ) / "models"


async def _provision(provisioner: Provisioner, template: Template, dry_run: bool) -> None:
    plan = await provisioner.plan(template.models)
    click.echo(f"{template.name} into {provisioner.models_dir}")
    for line in plan.lines():
        click.echo(line)
    for node in template.custom_nodes:
        repository = without_userinfo(node.repository)
        click.echo(f"custom node {repository} at {node.commit}: comes with `provision comfyui --nodes-of`")
    if dry_run or not plan.work:
        return
    began = provisioner.clock.monotonic()
    try:
        async with anyio.create_task_group() as showing:
            showing.start_soon(_show, provisioner)
            await provisioner.carry_out(plan)
            showing.cancel_scope.cancel()
    except* FleetError as failures:
        raise the_error_in(failures) from None
    seconds = provisioner.clock.monotonic() - began
    fetched = provisioner.progress.fetched_bytes
    click.echo(f"done: {size(fetched)} in {seconds:.0f} s ({size(fetched / max(seconds, 0.001))}/s)")


async def _show(provisioner: Provisioner) -> None:
    """On a terminal bars that are redrawn, else a line now and then."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be drawn over
    drawn = 0
    while True:
        await provisioner.clock.sleep(0.5 if is_terminal else _SHOW_EVERY_S)
        line = provisioner.progress.describe(provisioner.clock.monotonic())
        if not is_terminal:
            click.echo(line)
            continue
        bars = provisioner.progress.bars()
        click.echo(f"\x1b[{drawn}A\x1b[J" if drawn else "", nl=False)
        for text in (*bars, line):
            click.echo(text[:width])
        drawn = len(bars) + 1

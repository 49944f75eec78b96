"""`comfyfleet provision TEMPLATE`: print what is to be done in steps and bytes, then do it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import click

from comfyfleet import logs
from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.provision.progress import Progress, size
from comfyfleet.provision.provisioner import Provisioner, the_error_in
from comfyfleet.provision.template import Template, find_template
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.settings.machine import default_data_dir
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.wire.errors import FleetError

_SHOW_EVERY_S = 2.0


@click.command()
@click.argument("template")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Default: the data directory's models.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
def command(template: str, models_dir: Path | None, dry_run: bool) -> None:
    """Download the models of TEMPLATE (name, hash or a TOML file) to where engines look for them."""
    logs.configure(level="warning")
    found = find_template(template)
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
    drawn = 0
    while True:
        await provisioner.clock.sleep(0.5 if is_terminal else _SHOW_EVERY_S)
        line = provisioner.progress.describe(provisioner.clock.monotonic())
        if not is_terminal:
            click.echo(line)
            continue
        bars = provisioner.progress.bars()
        click.echo(f"\x1b[{drawn}A" if drawn else "", nl=False)
        for text in (*bars, line):
            click.echo(f"\x1b[2K{text}")
        drawn = len(bars) + 1

"""`comfyfleet clean`: free disk space by the worker's own rule, now and by hand."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import click

from comfyfleet.clock import SystemClock
from comfyfleet.provision.clean import Rule, candidates, files_in
from comfyfleet.provision.progress import size
from comfyfleet.provision.staging import free_bytes
from comfyfleet.settings.machine import default_data_dir
from comfyfleet.settings.provision import ProvisionSettings
from comfyfleet.worker.housekeeping import CleanedFolders, clean


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Default: COMFYFLEET_DATA_DIR or the user's.",
)
@click.option("--min-free", type=int, help="Bytes that should be free (default COMFYFLEET_MIN_FREE_BYTES or 512 MB).")
@click.option("--models-budget", type=int, help="Bytes that models may take; 0 (default) leaves them all.")
@click.option("--dry-run", is_flag=True, help="Say what would go and stop.")
def command(data_dir: Path | None, min_free: int | None, models_budget: int | None, dry_run: bool) -> None:
    """Remove old outputs when the disk is nearly full; never one of a running or unread job."""
    folder = data_dir or default_data_dir(os.environ)
    workers = folder / "workers"
    own = ProvisionSettings.from_environment(os.environ, workers)
    rule = Rule(
        min_free_bytes=own.min_free_bytes if min_free is None else min_free,
        old_after_s=own.old_after_s,
        models_budget_bytes=own.models_budget_bytes if models_budget is None else models_budget,
    )
    folders = CleanedFolders(
        output=folder / "output",
        engine=tuple(sorted(workers.glob("*/engine"))),
        models=folder / "models",
    )
    kept = kept_folders(workers)
    now = SystemClock().now()
    click.echo(rule.sentence())
    click.echo(f"{size(free_bytes(folder))} free")
    if dry_run:
        kept_paths = {folders.output / name for name in kept}
        for file in candidates(
            files_in(folders.all), rule, now=now, is_kept=lambda path: not kept_paths.isdisjoint(path.parents)
        ):
            click.echo(f"old: {file.path.relative_to(folder)} ({size(file.size_bytes)})")
        return
    cleaned = clean(folders, rule, now=now, kept=kept)
    for path in cleaned.removed:
        click.echo(f"removed {path.relative_to(folder)}")
    click.echo(f"{len(cleaned.removed)} files removed, {size(cleaned.free_bytes)} free")
    if cleaned.is_full:
        raise click.ClickException("the disk is still full: nothing more may be removed")


def kept_folders(workers: Path) -> set[str]:
    """Folders of jobs that any worker's journal still holds."""
    found: set[str] = set()
    for path in workers.glob("*/journal.sqlite3"):
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        try:
            found.update(row[0] for row in db.execute("SELECT folder FROM job"))
        except sqlite3.Error as problem:
            raise click.ClickException(f"{path} cannot be read: {problem}") from problem
        finally:
            db.close()
    return found

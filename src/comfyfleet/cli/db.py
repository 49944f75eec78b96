"""`comfyfleet db`: the control plane's database. Works on it directly, so stop the control plane for an import."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from comfyfleet.control.store.connection import Connection, ConnectionLost
from comfyfleet.control.store.migrations import SchemaTooNew, upgrade
from comfyfleet.control.store.transfer import (
    NotAnExport,
    NotEmpty,
    counts,
    export_lines,
    import_lines,
    open_connection,
    problems,
)
from comfyfleet.settings.control import control_settings


@click.group()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the SQLite file is.")
@click.option("--database", help="postgresql://… instead.")
@click.pass_context
def command(context: click.Context, data_dir: Path | None, database: str | None) -> None:
    """Upgrade, check, export and import the control plane's database."""
    try:
        context.obj = control_settings(os.environ, data_dir=data_dir, database=database)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@contextlib.contextmanager
def opened(context: click.Context) -> Iterator[Connection]:
    """The database; its own refusals become one line."""
    connection = open_connection(context.obj.database, context.obj.data_dir)
    try:
        yield connection
    except (ConnectionLost, SchemaTooNew, NotEmpty, NotAnExport) as error:
        raise click.ClickException(str(error)) from error
    finally:
        connection.close()


@command.command("upgrade")
@click.pass_context
def upgrade_database(context: click.Context) -> None:
    """Apply missing schema steps. `comfyfleet control` does the same at its start."""
    with opened(context) as connection:
        applied = upgrade(connection)
    click.echo(f"applied steps {', '.join(map(str, applied))}" if applied else "nothing to do")


@command.command("check")
@click.pass_context
def check_database(context: click.Context) -> None:
    """Look for damage; exit code 1 if there is any."""
    with opened(context) as connection:
        found = problems(connection)
        if not found:
            click.echo(", ".join(f"{table} {count}" for table, count in counts(connection).items()))
    for problem in found:
        click.echo(problem, err=True)
    sys.exit(1 if found else 0)


@command.command("export")
@click.argument("file", type=click.File("wb"))
@click.pass_context
def export_database(context: click.Context, file: BinaryIO) -> None:
    """Write everything to FILE (- for standard output). Secrets in it stay sealed; keep master.key beside it."""
    with opened(context) as connection:
        upgrade(connection)
        for line in export_lines(connection):
            file.write(line)


@command.command("import")
@click.argument("file", type=click.File("rb"))
@click.pass_context
def import_database(context: click.Context, file: BinaryIO) -> None:
    """Fill an empty database from FILE (- for standard input)."""
    with opened(context) as connection:
        click.echo(f"{import_lines(connection, file)} rows")

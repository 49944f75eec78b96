"""The `comfyfleet` command: a table of commands, each in a module of its own that is imported when it runs.

`comfyfleet --help` imports none of them, so it answers in a fraction of a second and needs only the bare install.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from comfyfleet.cli.lifeline import hold_lifeline
from comfyfleet.version import __version__
from comfyfleet.wire.errors import FleetError

# name -> (module, one line of help). The module has a click command named `command`.
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("comfyfleet.cli.up", "Run everything on this machine: control plane, workers, engine."),
    "demo": ("comfyfleet.cli.demo", "Send the documents' two requests through a fleet of one, and check the files."),
    "run": ("comfyfleet.cli.run", "Execute a workflow in the embedded engine, with no servers."),
    "control": ("comfyfleet.cli.control", "Run the control plane."),
    "worker": ("comfyfleet.cli.worker", "Run one worker; --standalone is the plain API wrapper."),
    "engine": ("comfyfleet.cli.engine", "Run the embedded engine, which speaks ComfyUI's protocol."),
    "endpoint": ("comfyfleet.cli.endpoint", "List, create, change and delete endpoints."),
    "workergroup": ("comfyfleet.cli.workergroup", "List, create, change and delete workergroups."),
    "fleet": ("comfyfleet.cli.fleet", "Machines: what there is, what runs where, what happened."),
    "key": ("comfyfleet.cli.key", "Make, list and revoke API keys."),
    "env": ("comfyfleet.cli.env", "Account variables given to every worker that starts."),
    "jobs": ("comfyfleet.cli.jobs", "Submit, list, follow and cancel durable jobs."),
    "template": ("comfyfleet.cli.template", "List templates and their hashes."),
    "provision": ("comfyfleet.cli.provision", "Plan and download what a template needs."),
    "bench-worker": ("comfyfleet.cli.bench_worker", "Run a worker's benchmark by hand."),
    "clean": ("comfyfleet.cli.clean", "Free disk space by the worker's own rule."),
    "simulate": ("comfyfleet.cli.simulate", "Drive router and autoscaler through a trace in virtual time."),
    "db": ("comfyfleet.cli.db", "Upgrade, check, export and import the control plane's database."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        try:
            found: click.Command = import_module(entry[0]).command
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if package == "comfyfleet":
                raise
            raise click.ClickException(
                f"`comfyfleet {cmd_name}` needs the package {package!r}: pip install 'comfyfleet[all]'"
            ) from error
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="comfyfleet")
def command() -> None:
    """An open, self-hostable serverless platform for ComfyUI workflows."""


def main() -> None:
    """Run the command line. What a user or his machine can mend is one line on stderr and exit code 1, no traceback."""
    hold_lifeline()
    # Torch's OpenMP threads spin while they wait; with a few busy processes beside them that made a render five times
    # slower (measured: 21 s against 4 s). The library reads this once, when it is loaded; children inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        command(prog_name="comfyfleet")
    except (FleetError, OSError, BaseExceptionGroup) as error:
        reason = _mendable(error)
        if reason is None:
            raise
        click.echo(f"comfyfleet: {reason}", err=True)
        sys.exit(1)


def _mendable(error: BaseException) -> str | None:
    """What to tell of a refusal, or of a file that this machine does not give; None for what is our own fault.

    Of several that ended a task group together the first speaks, and only when every one of them is of that kind.
    """
    if isinstance(error, BaseExceptionGroup):
        reasons = [_mendable(one) for one in error.exceptions]
        return None if None in reasons else reasons[0]
    if isinstance(error, FleetError):
        return error.message
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None

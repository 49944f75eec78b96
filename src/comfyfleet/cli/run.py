"""`comfyfleet run WORKFLOW.json`: a graph in the embedded engine, in this process, with no servers.

The documents' files run as they are: `__RANDOM_INT__` is replaced as the wrapper does it. Exit code 1 when the graph is
refused or fails, with the node and the input by name.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import click

from comfyfleet.cli.values import known_device, show_again
from comfyfleet.engine.events import Event, NodeProgress, NodeReused, NodeShown, NodeStarted, RunOutcome, Ui
from comfyfleet.engine.graph import PromptRefused
from comfyfleet.engine.miniatures import ensure
from comfyfleet.engine.render.setup import RenderSettings
from comfyfleet.engine.run import run_graph
from comfyfleet.ids import SystemIds
from comfyfleet.settings.machine import default_data_dir
from comfyfleet.wire.workflow import Graph, read_graph
from comfyfleet.worker.stages.prepare import roll_dice

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("workflow", type=click.File("rb"))
@click.option(
    "--models-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Model folders; the data directory's by default.",
)
@click.option("--output-dir", type=FOLDER, default=Path("output"), show_default=True, help="Where Save nodes write.")
@click.option("--input-dir", type=FOLDER, help="Where LoadImage and its kin look; beside the workflow by default.")
@click.option("--device", callback=known_device, default="cpu", show_default=True, help="cpu or cuda:0.")
def command(workflow: BinaryIO, models_dir: Path | None, output_dir: Path, input_dir: Path | None, device: str) -> None:
    """Execute a workflow (a file in API format; - is standard input) in the embedded engine, with no servers."""
    path = Path(workflow.name)
    graph = roll_dice(read_graph(workflow.read(), field=path.name), SystemIds())
    data_dir = default_data_dir(os.environ)
    miniatures_dir = data_dir / "miniatures"
    ensure(miniatures_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folders = RenderSettings(
            models_dir=str((models_dir or data_dir / "models").resolve()),
            miniatures_dir=str(miniatures_dir.resolve()),
            input_dir=str((input_dir or path.parent).resolve()),
            output_dir=str(output_dir.resolve()),
            temp_dir=temporary,
            device=device,
        )
        bar = NodeBar(graph)
        try:
            outcome = run_graph(graph, folders, bar.show)
        except PromptRefused as refused:
            raise click.ClickException(_refusal(refused)) from refused
        finally:
            bar.end()
    sys.exit(_tell(outcome, output_dir.resolve()))


class NodeBar:
    """A progress bar over nodes and steps: on a terminal one moving line, elsewhere one line per node."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._started = 0
        self._on_terminal = sys.stderr.isatty()

    def show(self, event: Event) -> None:
        if isinstance(event, NodeStarted):
            self._started += 1
            self._draw(event.node, 0.0)
            if not self._on_terminal:
                click.echo(self._line(event.node, ""), err=True)
        elif isinstance(event, NodeProgress):
            self._draw(event.node, event.value / event.maximum if event.maximum else 0.0)
        elif isinstance(event, NodeShown | NodeReused):
            self._draw(event.node, 1.0)

    def _draw(self, node: str, share: float) -> None:
        if self._on_terminal:
            filled = round(24 * share)
            bar = f"[{'█' * filled}{'·' * (24 - filled)}] {share:4.0%}"
            show_again(self._line(node, bar), err=True)

    def _line(self, node: str, bar: str) -> str:
        return f"{self._started:3d}/{len(self._graph)}  {self._graph[node]['class_type']:<28} {bar}"

    def end(self) -> None:
        if self._on_terminal:
            click.echo(err=True)


def _refusal(refused: PromptRefused) -> str:
    """The refusal with each node's and input's name."""
    lines = [str(refused)]
    for node_id, found in refused.node_errors.items():
        for error in found["errors"]:
            where = error.get("extra_info", {}).get("input_name", "")
            lines.append(
                f"  node {node_id} ({found['class_type']}), {where}: {error['message']} {error['details']}".rstrip()
            )
    return "\n".join(lines)


def _tell(outcome: RunOutcome, output_dir: Path) -> int:
    for ui in outcome.outputs.values():
        for entry in _files(ui):
            if entry.get("type") == "output":
                click.echo(output_dir / entry["subfolder"] / entry["filename"])
    if outcome.miniature:
        click.echo("made with miniature models: noise, not art (put real checkpoints into --models-dir)", err=True)
    if outcome.failure is not None:
        failure = outcome.failure
        click.echo(
            f"node {failure.node_id} ({failure.node_type}) failed: {failure.exception_type}: "
            f"{failure.exception_message.strip()}",
            err=True,
        )
    return 0 if outcome.status == "success" else 1


def _files(ui: Ui) -> list[dict[str, Any]]:
    return [entry for entries in ui.values() for entry in entries if isinstance(entry, dict) and "filename" in entry]

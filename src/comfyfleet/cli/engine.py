"""`comfyfleet engine`: the embedded engine's server and its render process."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import uvicorn

from comfyfleet import logs
from comfyfleet.cli.values import PORT, known_device
from comfyfleet.clock import SystemClock
from comfyfleet.engine.render.setup import RenderSettings
from comfyfleet.engine.server.app import build
from comfyfleet.ids import SystemIds
from comfyfleet.listening import HearsOut

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Anywhere else nothing protects it.")
@click.option("--port", type=PORT, default=18188, show_default=True, help="ComfyUI's port.")
@click.option("--models-dir", type=FOLDER, required=True, help="Model folders, as ComfyUI has them.")
@click.option("--miniatures-dir", type=FOLDER, required=True, help="Searched after the models folder; filled at start.")
@click.option("--input-dir", type=FOLDER, required=True, help="Where LoadImage and its kin look.")
@click.option("--output-dir", type=FOLDER, required=True, help="Where Save nodes write.")
@click.option("--temp-dir", type=FOLDER, required=True, help="Emptied at start.")
@click.option("--user-dir", type=FOLDER, help="What an editor keeps; beside the input folder unless given.")
@click.option("--device", callback=known_device, default="cpu", show_default=True, help="cpu or cuda:0.")
@click.option("--cache-mb", default=0, help="What cached results may take; 0: a fifth of the memory.")
@click.option("--model-mb", default=0, help="What models may take of the device; 0: most of it.")
@click.option("--compile", "compiles", is_flag=True, help="On a GPU: faster steps; the first job of a size waits.")
def command(
    host: str,
    port: int,
    models_dir: Path,
    miniatures_dir: Path,
    input_dir: Path,
    output_dir: Path,
    temp_dir: Path,
    user_dir: Path | None,
    device: str,
    cache_mb: int,
    model_mb: int,
    compiles: bool,
) -> None:
    """Run the embedded engine, which speaks ComfyUI's protocol."""
    logs.configure()
    settings = RenderSettings(
        models_dir=str(models_dir.resolve()),
        miniatures_dir=str(miniatures_dir.resolve()),
        input_dir=str(input_dir.resolve()),
        output_dir=str(output_dir.resolve()),
        temp_dir=str(temp_dir.resolve()),
        user_dir=str(user_dir.resolve()) if user_dir is not None else "",
        device=device,
        cache_bytes=cache_mb << 20,
        model_bytes=model_mb << 20,
        compiles=compiles,
    )
    hopeless = ""

    def give_up(reason: str) -> None:
        nonlocal hopeless
        hopeless = reason
        server.should_exit = True

    config = uvicorn.Config(
        HearsOut(build(settings, SystemClock(), SystemIds(), give_up)),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        ws_max_size=4 << 20,
        ws_ping_interval=None,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    server.run()
    if hopeless:
        click.echo(hopeless, err=True)  # the last line: whoever started this engine shows it
    sys.exit(0 if server.started and not hopeless else 1)

"""`comfyfleet demo`: the documents' two requests, end to end on this machine, and a hard look at what came out.

Starts `comfyfleet up` in a data directory of its own, sends each request as the documents' Python examples do, shows
progress, downloads each URL, probes the files, prints one table, and exits 1 when anything is not as asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.abc
import click

from comfyfleet.cli.demo_checks import film_faults, probe_film, probe_song, song_faults
from comfyfleet.cli.lifeline import LIFELINE_VARIABLE
from comfyfleet.cli.values import PORT, show_again
from comfyfleet.client import Endpoint, Serverless
from comfyfleet.wire.errors import Unavailable

ENDPOINT_NAME = "comfyui-json"
READY_LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    title: str
    file: str


REQUESTS = (
    DemoRequest(title="ACE-Step: a song", file="ace_step_v1_t2m.json"),
    DemoRequest(title="Wan 2.2: a film", file="wan22_t2v_a14b.json"),
)


@dataclass(kw_only=True)
class DemoRow:
    """One line of the table. faults: what was not as asked."""

    title: str
    seconds: float
    file: str = "–"
    url: str = "–"
    is_really: str = "–"
    faults: list[str] = field(default_factory=list)


@click.command()
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="For the files.",
)
@click.option("--port", type=PORT, default=0, help="Port of the control plane; 0 takes a free one.")
def command(output_dir: Path, port: int) -> None:
    """Send the documents' two requests through a fleet of one, and check the files."""
    sys.exit(anyio.run(_demo, output_dir.resolve(), port))


async def _demo(output_dir: Path, port: int) -> int:
    output_dir.mkdir(parents=True, exist_ok=True)
    data_dir = output_dir / "data"
    async with _system(data_dir, port):
        rows = await _send_all(output_dir)
    click.echo()
    click.echo(_table(rows))
    faults = [f"{row.title}: {fault}" for row in rows for fault in row.faults]
    for fault in faults:
        click.echo(f"✗ {fault}", err=True)
    click.echo("every check passed" if not faults else f"{len(faults)} checks failed")
    return 1 if faults else 0


@contextlib.asynccontextmanager
async def _system(data_dir: Path, port: int) -> AsyncIterator[None]:
    """`comfyfleet up`, running; its client.toml is what `Serverless()` finds."""
    client_file = data_dir / "client.toml"
    client_file.unlink(missing_ok=True)
    process = await anyio.open_process(
        [sys.executable, "-m", "comfyfleet", "up", "--data-dir", str(data_dir), "--port", str(port), "--no-link"],
        stdin=subprocess.DEVNULL,
        stdout=None,
        stderr=None,
        env={**os.environ, LIFELINE_VARIABLE: str(os.getpid())},
    )
    try:
        await _until(client_file, process)
        config_home = data_dir / "config"
        (config_home / "comfyfleet").mkdir(parents=True, exist_ok=True)
        link = config_home / "comfyfleet" / "client.toml"
        link.unlink(missing_ok=True)
        link.symlink_to(client_file)
        os.environ["XDG_CONFIG_HOME"] = str(config_home)
        for name in ("COMFYFLEET_URL", "COMFYFLEET_API_KEY", "VAST_API_KEY"):
            os.environ.pop(name, None)
        yield
    finally:
        with anyio.CancelScope(shield=True), contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
            await process.wait()


async def _until(path: Path, process: anyio.abc.Process) -> None:
    with anyio.move_on_after(READY_LIMIT_S):
        while not path.exists():
            if process.returncode is not None:
                raise Unavailable(f"comfyfleet up stopped with exit code {process.returncode}")
            await anyio.sleep(0.05)
        return
    raise Unavailable(f"comfyfleet up was not ready in {READY_LIMIT_S:g} s")


async def _send_all(output_dir: Path) -> list[DemoRow]:
    rows = []
    async with Serverless() as client:
        endpoint = await client.get_endpoint(name=ENDPOINT_NAME)
        await _until_a_worker_is_ready(endpoint)
        for request in REQUESTS:
            click.echo(f"\n{request.title}")
            progress = ProgressLine()
            began = anyio.current_time()
            response = await endpoint.request("/generate/sync", payload(request), on_progress=progress.show)
            progress.end()
            row = DemoRow(title=request.title, seconds=anyio.current_time() - began)
            await _inspect(row, response["response"], response["status"], output_dir)
            rows.append(row)
    return rows


async def _until_a_worker_is_ready(endpoint: Endpoint) -> None:
    """A request would wait by itself; this way the table's seconds are the request's alone."""
    with anyio.fail_after(READY_LIMIT_S):
        while True:
            if any(worker.status == "idle" for worker in await endpoint.get_workers()):
                return
            await anyio.sleep(0.25)


def payload(request: DemoRequest) -> dict[str, Any]:
    """The documents' payload: every field of it, empty strings included."""
    source = resources.files("comfyfleet.cli") / "requests" / request.file
    return {
        "input": {
            "request_id": "",
            "workflow_json": json.loads(source.read_text(encoding="utf-8")),
            "s3": {
                "access_key_id": "",
                "secret_access_key": "",
                "endpoint_url": "",
                "bucket_name": "",
                "region": "",
            },
            "webhook": {"url": "", "extra_params": {"user_id": "12345", "project_id": "abc-def"}},
        }
    }


async def _inspect(row: DemoRow, result: Any, status: int, output_dir: Path) -> None:
    if not isinstance(result, dict) or result.get("status") != "completed" or not result.get("output"):
        row.faults.append(f"HTTP {status}: {json.dumps(result)[:500]}")
        return
    entry = result["output"][0]
    row.file, row.url = entry["filename"], entry["url"]
    async with aiohttp.ClientSession() as session, session.get(entry["url"]) as answer:
        content = await answer.read()
        if answer.status != 200:
            row.faults.append(f"its URL answers {answer.status}")
            return
    path = output_dir / entry["filename"]
    path.write_bytes(content)
    if hashlib.sha256(content).digest() != hashlib.sha256(Path(entry["local_path"]).read_bytes()).digest():
        row.faults.append("its URL has other bytes than the worker's file")
    if path.suffix == ".mp3":
        song = await anyio.to_thread.run_sync(probe_song, path)
        row.is_really = str(song)
        row.faults.extend(song_faults(song))
    else:
        film = await anyio.to_thread.run_sync(probe_film, path)
        row.is_really = str(film)
        row.faults.extend(film_faults(film))
    if result.get("miniature"):
        row.is_really += " (miniature models: noise, not art)"


class ProgressLine:
    """One line that is rewritten on a terminal, and a line per tenth elsewhere."""

    def __init__(self) -> None:
        self._shown = -1

    def show(self, snapshot: dict[str, Any]) -> None:
        percentage = int(float(snapshot.get("percentage") or 0.0))
        text = f"  {percentage:3d} %  {snapshot.get('message') or snapshot.get('status') or ''}"
        if sys.stdout.isatty():
            show_again(text)
        elif percentage // 10 != self._shown:
            click.echo(text)
        self._shown = percentage // 10

    def end(self) -> None:
        if sys.stdout.isatty():
            click.echo()


def _table(rows: list[DemoRow]) -> str:
    lines = [("request", "seconds", "file", "what the file really is", "URL")]
    lines += [(row.title, f"{row.seconds:.1f}", row.file, row.is_really, row.url) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)

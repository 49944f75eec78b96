"""`comfyfleet up`: the whole system on this machine, until Ctrl-C.

Makes, once, in the data directory: an admin key (by the control plane), the endpoint `comfyui-json` with its
workergroup, and client.toml. Then it prints where things are, and how the first worker is getting on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import click

from comfyfleet import logs
from comfyfleet.cli.template import own_template
from comfyfleet.cli.up_installation import end_processes, held_lock, owned_processes, say_where, write_client_file
from comfyfleet.cli.up_supervisor import ControlPlaneSupervisor, become_subreaper, listen
from comfyfleet.cli.values import PORT
from comfyfleet.client import Serverless
from comfyfleet.gpu import gpu_facts
from comfyfleet.settings.client import config_file
from comfyfleet.settings.machine import OWNER_VARIABLE, default_data_dir
from comfyfleet.wire.errors import FleetError, NotFound, Unavailable

ENDPOINT = "comfyui-json"
START_LIMIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    data_dir: Path
    host: str
    port: int
    max_workers: int
    template: str
    link: Path | None
    fleet: tuple[str, ...] = ("local",)


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where everything is kept.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the control plane.")
@click.option(
    "--port", type=PORT, default=8080, show_default=True, help="Port of the control plane; 0 takes a free one."
)
@click.option(
    "--max-workers", type=click.IntRange(min=0), default=0, help="At most so many workers; 0 is one per GPU, or one."
)
@click.option(
    "--template",
    default="local",
    show_default=True,
    help="Template of the first workergroup: name, hash, or a TOML file.",
)
@click.option(
    "--fleet", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Who runs workers."
)
@click.option("--ray-address", help="host:port of the Ray head, for --fleet ray.")
@click.option("--no-link", is_flag=True, help="Do not link client.toml into the user's configuration folder.")
def command(
    data_dir: Path | None,
    host: str,
    port: int,
    max_workers: int,
    template: str,
    fleet: str,
    ray_address: str | None,
    no_link: bool,
) -> None:
    """Run everything on this machine: control plane, workers, engine. Ctrl-C stops all of it."""
    logs.configure()
    if fleet == "ray" and not ray_address:
        raise click.UsageError("--fleet ray needs --ray-address HOST:PORT, the Ray head's")
    own_template(template)  # a file of his own with a fault in it is told before anything starts
    options = UpOptions(
        data_dir=(data_dir or default_data_dir(os.environ)).resolve(),
        host=host,
        port=port,
        max_workers=max_workers or max(1, len(gpu_facts())),  # without a GPU, the CPU serves
        template=template,
        link=None if no_link else config_file(os.environ),
        fleet=("ray", "--ray-address", ray_address) if fleet == "ray" and ray_address else ("local",),
    )
    sys.exit(anyio.run(_up, options, backend_options={"use_uvloop": True}))


async def _up(options: UpOptions) -> int:
    with (
        held_lock(options.data_dir) as lock,  # before the port: the same `up` again is told where the first one is
        listen(options.host, options.port) as listener,
        # To the very end: a second Ctrl-C must not cut the tidying short.
        anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals,
    ):
        url = _url(options.host, listener.getsockname()[1])
        say_where(lock, url)
        if orphans := owned_processes(options.data_dir):
            click.echo(f"ending {len(orphans)} processes that a killed run left behind")
            await anyio.to_thread.run_sync(lambda: end_processes(orphans, grace_s=5.0))
        become_subreaper()
        supervisor = ControlPlaneSupervisor(
            arguments=[
                "--data-dir",
                str(options.data_dir),
                "--fleet",
                *options.fleet,
                "--max-workers",
                str(options.max_workers),
            ],
            environment={**os.environ, OWNER_VARIABLE: str(options.data_dir)},
            log_path=options.data_dir / "control.log",
        )
        failure: FleetError | None = None
        try:
            async with anyio.create_task_group() as running:
                running.start_soon(_stop_on_signal, signals, running.cancel_scope, name="signals")
                running.start_soon(supervisor.run, listener, name="control plane")
                await _set_up(options, url)
                running.start_soon(_tell_first_worker, url, options.data_dir, name="first worker")
        except* FleetError as errors:
            failure = _first(errors)
        finally:
            with anyio.CancelScope(shield=True):
                click.echo("stopping")
                await supervisor.stop()
                click.echo("stopped")
        if failure is not None:
            raise failure
    return 0


def _first(group: BaseExceptionGroup[FleetError]) -> FleetError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FleetError)  # noqa: S101 - the group was split by this type
    return error


def _url(host: str, port: int) -> str:
    """How this machine reaches a control plane that listens there: "everywhere" is no address to connect to."""
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 - compared, not listened on
        host = "::1" if host == "::" else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _stop_on_signal(signals: AsyncIterator[signal.Signals], scope: anyio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def _set_up(options: UpOptions, url: str) -> None:
    """Wait for the control plane; make endpoint and workergroup the first time; write client.toml; print it all."""
    api_key = await _admin_key(options.data_dir / "admin.key")
    async with Serverless(api_key, url=url) as client:
        await _until_healthy(client)
        made = options.data_dir / "up.made"
        if not made.exists():
            await _make_endpoint(client, options)
            made.touch()
    client_file = write_client_file(options.data_dir, url=url, api_key=api_key, link=options.link)
    click.echo(
        f"comfyfleet is up\n"
        f"  control plane  {url}   (API: {url}/docs)\n"
        f"  endpoint       {ENDPOINT}\n"
        f"  data           {options.data_dir}\n"
        f"  client file    {client_file}"
    )
    if sys.stdout.isatty():
        click.echo(f"  admin key      {api_key}")
    click.echo("Ctrl-C stops everything.")


async def _admin_key(path: Path) -> str:
    with anyio.move_on_after(START_LIMIT_S):
        while True:
            if path.exists() and (key := path.read_text(encoding="utf-8").strip()):
                return key
            await anyio.sleep(0.05)
    raise Unavailable(f"the control plane made no admin key in {START_LIMIT_S:g} s; see {path.parent / 'control.log'}")


async def _until_healthy(client: Serverless) -> None:
    with anyio.move_on_after(START_LIMIT_S):
        while True:
            try:
                await client.get("/health")
            except FleetError:
                await anyio.sleep(0.1)
            else:
                return
    raise Unavailable(f"the control plane at {client.url} did not become healthy in {START_LIMIT_S:g} s")


async def _make_endpoint(client: Serverless, options: UpOptions) -> None:
    """The endpoint and its workergroup; whichever of the two an `up` that failed half-way made already stays."""
    found = next((endpoint.id for endpoint in await client.get_endpoints() if endpoint.name == ENDPOINT), None)
    if found is None:
        made: dict[str, Any] = await client.post(
            "/api/v0/endptjobs/",
            {
                "endpoint_name": ENDPOINT,
                "min_load": 1.0,
                "cold_workers": 1,
                "max_workers": options.max_workers,
            },
        )
        found = made["result"]
    groups: dict[str, Any] = await client.get("/api/v0/workergroups/")
    if not any(group["endpoint_id"] == found for group in groups["results"]):
        template = options.template
        if own := own_template(template):
            template = (await client.post("/api/v0/template/", own))["hash_id"]
        await client.post("/api/v0/workergroups/", {"endpoint_id": found, "template_hash": template})


async def _tell_first_worker(url: str, data_dir: Path) -> None:
    """Print each change of the workers' state until one is ready."""
    api_key = (data_dir / "admin.key").read_text(encoding="utf-8").strip()
    began = anyio.current_time()
    last = ""
    async with Serverless(api_key, url=url) as client:
        endpoint = await client.get_endpoint(ENDPOINT)
        while True:
            try:
                workers = await endpoint.get_workers()
            except NotFound:
                return  # somebody deleted the endpoint: there is no first worker to wait for
            except Unavailable:
                continue  # the supervisor is bringing the control plane back
            now = ", ".join(f"worker {w.id}: {w.status}{f' ({w.reason})' if w.reason else ''}" for w in workers)
            if now != last:
                click.echo(f"  [{anyio.current_time() - began:5.1f} s] {now or 'no worker yet'}")
                last = now
            if ready := next((worker for worker in workers if worker.status == "idle"), None):
                if docs := _wrapper_docs(data_dir, ready.id):
                    click.echo(f"worker {ready.id}'s API wrapper: {docs}")
                click.echo("ready")
                return
            await anyio.sleep(0.25)


def _wrapper_docs(data_dir: Path, worker_id: int) -> str:
    """Where a local worker's wrapper is: its usual port, or the next free one. "" for one on another machine."""
    if not (data_dir / "workers" / str(worker_id) / "local.json").exists():
        return ""
    record = json.loads((data_dir / "workers" / str(worker_id) / "local.json").read_text(encoding="utf-8"))
    return f"http://127.0.0.1:{record['slot']['wrapper']}/docs"

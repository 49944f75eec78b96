"""`comfyfleet jobs`: durable jobs. Submit a workflow, and look, follow or cancel later, from anywhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click
import msgspec

from comfyfleet.cli.asking import Asking, asking, printable, show, show_table
from comfyfleet.cli.values import COUNT, IDENTIFIER, OVER_ZERO
from comfyfleet.control.jobs import MAX_PRIORITY

_POLL_S = 0.5
_PRIORITY = click.IntRange(-MAX_PRIORITY, MAX_PRIORITY)
_FINAL = ("completed", "failed", "cancelled")


@click.group()
def command() -> None:
    """Durable jobs: stored before they are accepted, and finished whatever restarts in between."""


@command.command("submit")
@click.argument("workflow", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--endpoint", default="comfyui-json", show_default=True)
@click.option(
    "--priority",
    type=_PRIORITY,
    default=0,
    show_default=True,
    help="Higher goes first; waiting raises it.",
)
@click.option("--deadline-s", type=OVER_ZERO, help="Give up after so many seconds.")
@click.option("--webhook", help="Where to tell the end.")
@click.option("--idempotency-key", help="The same key again is the same job.")
@click.option("--wait", is_flag=True, help="Follow it to its end.")
@asking
def submit_job(
    ask: Asking,
    workflow: Path,
    endpoint: str,
    priority: int,
    deadline_s: float | None,
    webhook: str | None,
    idempotency_key: str | None,
    wait: bool,
) -> None:
    """Submit a workflow in API format."""
    try:
        graph = msgspec.json.decode(workflow.read_bytes())
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{workflow} is not JSON: {error}") from error
    body: dict[str, Any] = {"endpoint": endpoint, "input": {"workflow_json": graph}, "priority": priority}
    if deadline_s is not None:
        body["deadline_s"] = deadline_s
    if webhook:
        body["webhook"] = {"url": webhook}
    if idempotency_key:
        body["idempotency_key"] = idempotency_key
    made = ask("POST", "/v1/jobs", body)
    if wait:
        _until_final(ask, made["id"])
    else:
        show(made) if ask.is_raw else click.echo(made["id"])


@command.command("list")
@click.option("--status")
@click.option("--endpoint")
@click.option("--limit", type=COUNT, default=20, show_default=True)
@asking
def list_jobs(ask: Asking, status: str | None, endpoint: str | None, limit: int) -> None:
    """Newest first."""
    asked = {"limit": str(limit), "status": status, "endpoint": endpoint}
    query = urlencode({name: text for name, text in asked.items() if text is not None}, errors="surrogateescape")
    rows = ask("GET", f"/v1/jobs?{query}")["jobs"]
    columns = ("id", "endpoint", "status", "priority", "created_at", "finished_at", "attempts", "worker_id")
    show(rows) if ask.is_raw else show_table(rows, columns)


@command.command("show")
@click.argument("job_id", type=IDENTIFIER)
@asking
def show_job(ask: Asking, job_id: str) -> None:
    """One job, whole."""
    show(ask("GET", _path(job_id)))


@command.command("wait")
@click.argument("job_id", type=IDENTIFIER)
@asking
def wait_for_job(ask: Asking, job_id: str) -> None:
    """Follow a job to its end; exit code 1 unless it completed."""
    _until_final(ask, job_id)


@command.command("cancel")
@click.argument("job_id", type=IDENTIFIER)
@asking
def cancel_job(ask: Asking, job_id: str) -> None:
    """Cancel it, waiting or running."""
    job = ask("POST", f"{_path(job_id)}/cancel")
    click.echo(job["status"] if job["status"] in _FINAL else f"{job['status']}; its worker is told")


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _until_final(ask: Asking, job_id: str) -> None:
    said = ""
    while True:
        job = ask("GET", _path(job_id))
        now = printable(job["status"] + (f": {job['waiting']['reason']}" if job.get("waiting") else ""))
        if now != said and not ask.is_raw:
            click.echo(now, err=True)
            said = now
        if job["status"] in _FINAL:
            break
        time.sleep(_POLL_S)
    if ask.is_raw:
        show(job)
    else:
        for output in (job["result"] or {}).get("output", []):
            click.echo(output.get("url") or output.get("local_path"))
        if job["error"]:
            click.echo(printable(job["error"].get("message", "")), err=True)
    raise SystemExit(0 if job["status"] == "completed" else 1)

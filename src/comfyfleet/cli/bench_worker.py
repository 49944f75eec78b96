"""`comfyfleet bench-worker`: a worker's benchmark by hand, against a running wrapper (or any wrapper of its kind)."""

from __future__ import annotations

import os
from pathlib import Path

import aiohttp
import anyio
import click

from comfyfleet import logs
from comfyfleet.cli.values import AMOUNT
from comfyfleet.clock import SystemClock
from comfyfleet.gpu import gpu_name
from comfyfleet.provision.template import find_template
from comfyfleet.wire.errors import BadRequest
from comfyfleet.wire.workflow import Graph, read_graph
from comfyfleet.worker.agent.benchmark import BenchmarkFailed, BenchmarkKey, ScoreCache, graph_digest, with_random_seeds
from comfyfleet.worker.agent.measuring import Measured, measure


@click.command()
@click.option("--url", default="http://127.0.0.1:18288", show_default=True, help="The wrapper's base URL.")
@click.option("--template", help="Whose graph (default COMFYFLEET_TEMPLATE or local).")
@click.option("--graph", type=click.Path(path_type=Path, dir_okay=False), help="A graph of your own, in API format.")
@click.option(
    "--limit",
    "limit_s",
    type=AMOUNT,
    default=600.0,
    show_default=True,
    help="Seconds for the measured rounds.",
)
@click.option("--cache", type=click.Path(path_type=Path, dir_okay=False), help="Remember the score in this file.")
def command(url: str, template: str | None, graph: Path | None, limit_s: float, cache: Path | None) -> None:
    """Run the benchmark: one warm-up, then rounds until the median is stable. Score = 100 / median seconds."""
    logs.configure(level="warning")
    name = template or os.environ.get("COMFYFLEET_TEMPLATE") or "local"
    given = graph or (Path(os.environ["BENCHMARK_JSON_PATH"]) if os.environ.get("BENCHMARK_JSON_PATH") else None)
    chosen = _graph(name, given)
    key = os.environ.get("COMFYFLEET_WORKER_KEY", "")
    try:
        measured = anyio.run(_measure, url.rstrip("/"), key, chosen, name, limit_s, cache)
    except BenchmarkFailed as failed:
        raise click.ClickException(f"the benchmark failed: {failed.cause}") from failed
    score = measured.score
    click.echo(f"score {score.score:.3f} (median {score.median_s:.3f} s of {len(score.rounds_s)} rounds)")
    if measured.is_cached:
        click.echo("cached: nothing that the score depends on has changed")
    if measured.flag:
        click.echo(f"flagged: {measured.flag}")


def _graph(template: str, path: Path | None) -> Graph:
    """A named file before the template's own."""
    if path is not None:
        if not path.is_file():
            raise BadRequest(f"there is no graph file {path}", field="graph")
        return read_graph(path.read_bytes(), field=path.name)
    graph = find_template(template).benchmark_graph()
    if graph is None:
        raise BadRequest(f"template {template} has no benchmark: give --graph", field="graph")
    return graph


async def _measure(url: str, key: str, graph: Graph, template: str, limit_s: float, cache: Path | None) -> Measured:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        anyio.TemporaryDirectory() as folder,
        aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)) as session,
    ):
        engines = await _engines(session, url)

        async def run_round(seeded: Graph) -> None:
            body = {"input": {"workflow_json": seeded, "force": True}}
            async with session.post(f"{url}/generate/sync", json=body) as answer:
                text = await answer.json(content_type=None)
                if answer.status != 200:
                    raise BenchmarkFailed(cause=str(text.get("message", answer.status)))

        return await measure(
            with_random_seeds(graph),
            BenchmarkKey(
                graph_digest=graph_digest(graph), gpu_name=gpu_name(), engine_version="by hand", template=template
            ),
            run_round=run_round,
            engines=engines,
            cache=ScoreCache(cache or Path(folder) / "scores.json"),
            clock=SystemClock(),
            limit_s=limit_s,
            on_round=lambda detail: click.echo(detail),
        )


async def _engines(session: aiohttp.ClientSession, url: str) -> int:
    """How many engines the wrapper has ready; 1 for a wrapper that does not say."""
    try:
        async with session.get(f"{url}/health") as answer:
            report = await answer.json(content_type=None)
    except (aiohttp.ClientError, OSError, ValueError) as problem:
        raise click.ClickException(f"no wrapper answers at {url}: {problem}") from problem
    ready, _, _ = str(report.get("backends_healthy", "1/1")).partition("/")
    return int(ready) if ready.isdigit() and int(ready) > 0 else 1

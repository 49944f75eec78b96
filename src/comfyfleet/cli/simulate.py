"""`comfyfleet simulate`: play a trace through the control plane's router and autoscaler in virtual time."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from comfyfleet.cli.values import NumberRange
from comfyfleet.control.scaling import ScalePolicy
from comfyfleet.control.simulator.files import FleetFile, read_endpoint, read_fleet
from comfyfleet.control.simulator.simulation import Simulation
from comfyfleet.control.simulator.strategies import FixedFleet, KnativeConcurrency, OurAutoscaler, Strategy
from comfyfleet.control.simulator.summary import Summary, clairvoyant, summarise
from comfyfleet.control.simulator.trace import GENERATORS, read_trace, write_trace

COLUMNS = ("policy", "requests", "wait p50", "p95", "p99", "GPU-s", "busy", "swap", "idle", "boot", "swaps", "cost")


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--endpoint", type=click.Path(path_type=Path, exists=True), help="TOML: the endpoint's parameters.")
@click.option("--workers", type=click.Path(path_type=Path, exists=True), help="TOML: kinds of GPU ([[gpu]] tables).")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, decisions included.")
@click.option(
    "--fixed",
    type=click.IntRange(0, 10_000),
    multiple=True,
    help="Baseline: a fixed fleet of so many workers (repeatable).",
)
@click.option(
    "--concurrency",
    type=NumberRange(0.01, 10_000),
    multiple=True,
    help="Baseline: Knative-style target (repeatable).",
)
@click.option("--no-baselines", is_flag=True, help="Only ours.")
@click.option("--tick", type=NumberRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between decisions.")
@click.option("--generate", type=click.Choice(sorted(GENERATORS)), help="Write such a trace to TRACE first.")
def command(
    trace: Path,
    endpoint: Path | None,
    workers: Path | None,
    out: Path | None,
    fixed: tuple[int, ...],
    concurrency: tuple[float, ...],
    no_baselines: bool,
    tick: float,
    generate: str | None,
) -> None:
    """Play TRACE (CSV: t_s,work_s,model,tenant) against an endpoint and a fleet, beside the baselines."""
    if generate:
        click.echo(f"{write_trace(trace, GENERATORS[generate]())} requests written to {trace}", err=True)
    if endpoint is None or workers is None:
        if generate:
            return
        raise click.UsageError("--endpoint and --workers are needed to play a trace")
    policy, fleet = read_endpoint(endpoint), read_fleet(workers)
    runs: list[tuple[str, Strategy, bool]] = [("comfyfleet", OurAutoscaler(), True)]
    if not no_baselines:
        runs.append(("least-loaded, no affinity", OurAutoscaler(), False))
        runs.extend((f"concurrency {target:g}", KnativeConcurrency(target), False) for target in concurrency or (1.0,))
        runs.extend((f"fixed {count}", FixedFleet(count), False) for count in fixed or (policy.max_workers,))
    summaries = [play(trace, policy, fleet, run, tick) for run in runs]
    if not no_baselines:
        summaries.append(clairvoyant(read_trace(trace), fleet))
    click.echo(table(summaries))
    if out is not None:
        body = {"endpoint": policy, "fleet": fleet, "runs": summaries}
        out.write_bytes(msgspec.json.format(msgspec.json.encode(body), indent=2) + b"\n")


def play(trace: Path, policy: ScalePolicy, fleet: FleetFile, run: tuple[str, Strategy, bool], tick_s: float) -> Summary:
    """One run over the file."""
    name, strategy, affinity = run
    simulation = Simulation(policy=policy, fleet=fleet, strategy=strategy, affinity=affinity, tick_s=tick_s)
    return summarise(name, simulation.run(read_trace(trace)), with_decisions=True)


def table(summaries: list[Summary]) -> str:
    """One line a policy."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for summary in summaries:
        seconds = summary.gpu_s
        rows.append(
            (
                summary.name,
                f"{summary.requests}" + (f" (+{summary.unserved} unserved)" if summary.unserved else ""),
                *(f"{summary.wait_s.get(p, 0.0):.1f} s" for p in ("p50", "p95", "p99")),
                *(f"{seconds.get(kind, 0.0):.0f}" for kind in ("total", "busy", "swap", "idle", "booting")),
                str(summary.swaps),
                f"{summary.cost:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

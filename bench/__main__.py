"""Run every room's figures (or those named on the command line), print a table, write bench/results.json.

    python -m bench [--list] [room ...]

A room is a module of this package with a function `figures() -> list[Figure]`. One that fails is shown with its error
and makes the exit code 1; the others still run.
"""

from __future__ import annotations

import json
import pkgutil
import sys
import traceback
from importlib import import_module
from pathlib import Path

import bench
from bench.figure import Figure

RESULTS = Path(__file__).parent / "results.json"


def rooms() -> list[str]:
    """Modules here that may have figures."""
    names = [module.name for module in pkgutil.iter_modules(bench.__path__)]
    return [name for name in names if name != "figure" and not name.startswith("_")]


def table(figures: list[Figure]) -> str:
    """One line a figure: value, goal, baseline, and whether the goal was met."""
    rows = [("figure", "value", "unit", "goal", "baseline", "")]
    for figure in figures:
        verdict = {True: "met", False: "MISSED", None: ""}[figure.is_met]
        goal = "" if figure.goal is None else f"{'≤' if figure.better == 'lower' else '≥'} {figure.goal:g}"
        baseline = "" if figure.baseline is None else f"{figure.baseline:.4g}"
        rows.append((figure.name, f"{figure.value:.4g}", figure.unit, goal, baseline, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: list[str]) -> int:
    """Measure the rooms named, or all; returns the exit code."""
    if "--list" in arguments:
        print("\n".join(rooms()))
        return 0
    unknown = set(arguments) - set(rooms())
    if unknown:
        print(f"no such room: {', '.join(sorted(unknown))}; there are {', '.join(rooms())}")
        return 2
    measured: list[Figure] = []
    failed: list[str] = []
    for room in arguments or rooms():
        module = import_module(f"bench.{room}")
        if not hasattr(module, "figures"):
            continue
        print(f"measuring {room} …", flush=True)
        try:
            measured.extend(module.figures())
        except Exception:
            failed.append(room)
            traceback.print_exc()
    RESULTS.write_text(json.dumps([figure.as_dict() for figure in measured], indent=2) + "\n", encoding="utf-8")
    print(table(measured))
    for room in failed:
        print(f"{room}: could not be measured (traceback above)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

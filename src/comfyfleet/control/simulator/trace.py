"""Traces: what arrives when. CSV with the columns `t_s,work_s,model,tenant`, in order of time; and three generators.

work_s is seconds of work at score 1.0, which is also its cost in load units. The generators are for the benchmark and
for a first try: bursty (quiet with bursts), diurnal (a day's wave), flash-crowd (steady, then ten times as much).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from comfyfleet.ids import SeededIds
from comfyfleet.wire.errors import BadRequest

COLUMNS = ("t_s", "work_s", "model", "tenant")
# A decision is made each second, so a wrong unit or two kinds of clock in one file would take days to play.
MAX_GAP_S = 30 * 86_400.0


class Arrival(NamedTuple):
    """One request."""

    t_s: float
    work_s: float
    model: str = ""
    tenant: str = ""


def read_trace(path: Path) -> Iterator[Arrival]:
    """Arrivals of a CSV file, one by one; a byte order mark, as Excel writes it, is fine.

    Times count from anywhere: a day's beginning, the epoch, before zero. Raises BadRequest naming line and column.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        try:
            at = _columns(next(rows, []))
            before = -math.inf
            for row in rows:
                if row:
                    arrival = _arrival(row, at, before)
                    before = arrival.t_s
                    yield arrival
        except UnicodeDecodeError as error:
            raise BadRequest(f"{path}, line {_undecodable_line(path)}: this is not UTF-8") from error
        except (ValueError, csv.Error) as error:
            raise BadRequest(f"{path}, line {max(1, rows.line_num)}: {error}") from error


def _columns(header: list[str]) -> dict[str, int]:
    """Where each known column is. Raises ValueError."""
    names = [name.strip() for name in header]
    if missing := [name for name in ("t_s", "work_s") if name not in names]:
        raise ValueError(f"the column {missing[0]} is missing; there must be {', '.join(COLUMNS)}")
    return {name: names.index(name) for name in COLUMNS if name in names}


def _arrival(row: list[str], at: dict[str, int], before: float) -> Arrival:
    """before: the time of the one before. Raises ValueError."""
    try:
        t_s, work_s = float(row[at["t_s"]]), float(row[at["work_s"]])
    except (ValueError, IndexError) as error:
        raise ValueError("t_s and work_s must be numbers") from error
    if not (math.isfinite(t_s) and math.isfinite(work_s)) or work_s < 0 or t_s < before:
        raise ValueError("times must not go back, work must not be negative, and both must be finite")
    if t_s - before > MAX_GAP_S and before > -math.inf:
        raise ValueError(f"nothing arrives for {(t_s - before) / 86_400:.0f} days before this: t_s is in seconds")
    model = row[at["model"]] if "model" in at and len(row) > at["model"] else ""
    tenant = row[at["tenant"]] if "tenant" in at and len(row) > at["tenant"] else ""
    return Arrival(t_s, work_s, model, tenant)


def _undecodable_line(path: Path) -> int:
    """The decoder reads ahead in blocks and cannot tell."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def write_trace(path: Path, arrivals: Iterable[Arrival]) -> int:
    """Write a trace file; how many arrivals."""
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for arrival in arrivals:
            writer.writerow([f"{arrival.t_s:.3f}", f"{arrival.work_s:.3f}", arrival.model, arrival.tenant])
            count += 1
    return count


def bursty(
    *, hours: float = 4.0, seed: int = 1, quiet_rate: float = 0.02, burst_rate: float = 0.6, work_s: float = 12.0
) -> Iterator[Arrival]:
    """Quiet stretches (10 min on average) broken by bursts (3 min on average). Rates are requests per second."""
    dice = SeededIds(seed)
    now, end = 0.0, hours * 3600.0
    while now < end:
        is_burst = dice.uniform(0, 1) < 0.5
        until = now + _exponential(dice, 180.0 if is_burst else 600.0)
        rate = burst_rate if is_burst else quiet_rate
        yield from _poisson(dice, now, min(until, end), _steady(rate), work_s, peak=rate)
        now = until


def diurnal(
    *, hours: float = 8.0, seed: int = 2, low_rate: float = 0.03, high_rate: float = 0.6, work_s: float = 12.0
) -> Iterator[Arrival]:
    """One smooth wave from low to high and back."""
    end = hours * 3600.0

    def rate(now: float) -> float:
        return low_rate + (high_rate - low_rate) * (1 - math.cos(2 * math.pi * now / end)) / 2

    yield from _poisson(SeededIds(seed), 0.0, end, rate, work_s, peak=high_rate)


def flash_crowd(
    *, hours: float = 3.0, seed: int = 3, usual_rate: float = 0.08, crowd_rate: float = 0.8, work_s: float = 12.0
) -> Iterator[Arrival]:
    """A steady stream; after a third of the time, ten minutes of ten times as much."""
    end = hours * 3600.0

    def rate(now: float) -> float:
        return crowd_rate if end / 3 <= now < end / 3 + 600.0 else usual_rate

    yield from _poisson(SeededIds(seed), 0.0, end, rate, work_s, peak=crowd_rate)


GENERATORS: dict[str, Callable[[], Iterator[Arrival]]] = {
    "bursty": bursty,
    "diurnal": diurnal,
    "flash-crowd": flash_crowd,
}

_MODELS = ("sd15", "sdxl", "flux", "wan22", "ace", "upscale")


def _steady(rate: float) -> Callable[[float], float]:
    return lambda _now: rate


def _poisson(
    dice: SeededIds, start: float, end: float, rate: Callable[[float], float], work_s: float, *, peak: float
) -> Iterator[Arrival]:
    """Arrivals of a varying rate, by thinning. Work is lognormal around `work_s`; models are Zipf-like."""

    now = start
    while True:
        now += _exponential(dice, 1 / peak)
        if now >= end:
            return
        if dice.uniform(0, peak) <= rate(now):
            yield Arrival(now, work_s * math.exp(0.5 * _normal(dice)), _zipf(dice), f"key{dice.random_int() % 5}")


def _exponential(dice: SeededIds, mean: float) -> float:
    return -mean * math.log(1.0 - dice.uniform(0, 1))


def _normal(dice: SeededIds) -> float:
    """Box and Muller's way."""
    radius = math.sqrt(-2.0 * math.log(1.0 - dice.uniform(0, 1)))
    return radius * math.cos(2.0 * math.pi * dice.uniform(0, 1))


def _zipf(dice: SeededIds) -> str:
    """The model at place n is asked for 1/n as often as the first."""
    weights = [1 / (place + 1) for place in range(len(_MODELS))]
    at = dice.uniform(0, sum(weights))
    for model, weight in zip(_MODELS, weights, strict=True):
        at -= weight
        if at <= 0:
            return model
    return _MODELS[-1]

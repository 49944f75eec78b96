"""One measured figure, and what it is held against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Figure:
    """value and goal in `unit`; `baseline` is the bare counterpart of the same run (None where there is none)."""

    name: str
    value: float
    unit: str
    goal: float | None
    better: Literal["lower", "higher"]
    baseline: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal was reached in this run; None where there is no goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

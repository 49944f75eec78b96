"""Start-up as data: which stage a worker is in, how long each took, and why it is not ready.

provisioning → engine_start → engine_ready → benchmark → registered → ready. Stages only move forward; an error names
the stage it happened in and stays until that stage is passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from comfyfleet.clock import Clock


class Stage(StrEnum):
    PROVISIONING = "provisioning"
    ENGINE_START = "engine_start"
    ENGINE_READY = "engine_ready"
    BENCHMARK = "benchmark"
    REGISTERED = "registered"
    READY = "ready"


ORDER = tuple(Stage)


@dataclass(kw_only=True)
class Startup:
    """One worker's way to Ready. `began_at` and all figures are in monotonic seconds."""

    clock: Clock
    stage: Stage = Stage.PROVISIONING
    detail: str = ""
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    loadtime_s: float = 0.0
    _began_at: float = field(init=False)
    _stage_began_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._began_at = self._stage_began_at = self.clock.monotonic()

    def enter(self, stage: Stage, detail: str = "") -> None:
        """Move forward to `stage`; entering the present or an earlier stage only changes the detail."""
        if ORDER.index(stage) > ORDER.index(self.stage):
            now = self.clock.monotonic()
            self.seconds[self.stage] = round(now - self._stage_began_at, 3)
            self.stage, self._stage_began_at, self.error = stage, now, ""
            if stage is Stage.READY:
                self.loadtime_s = max(now - self._began_at, 0.001)
        self.detail = detail

    def recover(self) -> None:
        """What failed in this stage is being tried again."""
        self.error = ""

    def fail(self, why: str) -> None:
        self.error = f"{self.stage}: {why}"

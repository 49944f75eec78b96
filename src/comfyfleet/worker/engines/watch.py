"""What the socket told about one prompt. Hints: whether it ended is asked from the history (`stages.execute`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio

from comfyfleet.clock import Clock
from comfyfleet.worker.engines.client import EngineEvent, Preview
from comfyfleet.worker.engines.faults import FaultKind
from comfyfleet.worker.engines.vitals import is_stalled


@dataclass(frozen=True, kw_only=True)
class SilenceLimits:
    """How long may pass without a word: node_s for the node at work, run_s for all of it."""

    node_s: Callable[[str], float]
    run_s: float


_ENDS = frozenset({"execution_success", "execution_error", "execution_interrupted"})
MAX_UPDATES = 10_000


class PromptWatch:
    """Follows one prompt in one engine. `told` is called after each event that a reader of progress may care about."""

    def __init__(
        self,
        prompt_id: str,
        *,
        clock: Clock,
        told: Callable[[PromptWatch], None] | None = None,
        limits: SilenceLimits | None = None,
    ) -> None:
        self.prompt_id = prompt_id
        self.client_id = ""  # of the socket it was submitted under; another one hears nothing of it
        self._limits = limits
        self._clock = clock
        self._told = told
        self.started_at: float | None = None
        self.last_heard = clock.monotonic()
        self.node: str | None = None
        self._node_since = 0.0
        self.node_seconds: dict[str, float] = {}
        self.executed: list[str] = []
        self.updates: list[dict[str, Any]] = []
        self.step: tuple[float, float] | None = None
        self.preview: Preview | None = None
        self.hint = anyio.Event()  # it ended, or so it seems
        self.stored = anyio.Event()  # its history entry is there: the engine took up its next work
        self.lost: FaultKind | None = None

    def hear(self, event: EngineEvent | Preview) -> None:
        """One event of this prompt, from the socket."""
        now = self.last_heard = self._clock.monotonic()
        if isinstance(event, Preview):
            self.preview = event
            return
        kind, data = event.type, event.data
        if kind == "progress" and data.value is not None and data.max:
            self.step = (data.value, data.max)
            if len(self.updates) < MAX_UPDATES:
                self.updates.append(_update(now - (self.started_at or now), data.value, data.max))
        elif kind == "executing" and data.node is not None:
            self._leave_node(now)
            self.node, self._node_since, self.step = data.node, now, None
            self.executed.append(data.node)
        elif kind == "execution_start":
            self.started_at = now
        elif kind in _ENDS or kind == "executing":
            self._leave_node(now)
            self.hint.set()
            if kind == "executing":
                self.stored.set()
            return
        else:
            return
        if self._told is not None:
            self._told(self)

    def lose(self, kind: FaultKind) -> None:
        """The engine is gone; the prompt with it."""
        self.lost = kind
        self.hint.set()

    def is_stalled(self, client_id: str) -> bool:
        """Silent for longer than the node at work ever was (or the whole run, where its events go unheard)."""
        if self._limits is None or self.started_at is None:
            return False
        now = self._clock.monotonic()
        if self.client_id != client_id or self.node is None:
            return is_stalled(now - self.started_at, self._limits.run_s)
        return is_stalled(now - self.last_heard, self._limits.node_s(self.node))

    def details(self, *, completed: bool, error: str | None) -> dict[str, Any]:
        """The documents' `execution_details`."""
        return {
            "prompt_id": self.prompt_id,
            "nodes_executed": self.executed,
            "progress_updates": self.updates,
            "completed": completed,
            "error": error,
        }

    def progress(self, weights: Mapping[str, float]) -> float:
        """Share done in percent: `weights` are each node's expected seconds (any unit); steps count within a node."""
        total = sum(weights.values()) or 1.0
        done = sum(weights.get(node, 0.0) for node in self.node_seconds)
        if self.node is not None and self.step is not None:
            done += weights.get(self.node, 0.0) * min(1.0, self.step[0] / self.step[1])
        return round(100.0 * min(1.0, done / total), 1)

    def _leave_node(self, now: float) -> None:
        if self.node is not None:
            self.node_seconds[self.node] = now - self._node_since
            self.node = None


def _update(at_s: float, value: float, maximum: float) -> dict[str, Any]:
    return {
        "time": round(at_s, 4),
        "value": _whole(value),
        "max": _whole(maximum),
        "percentage": _whole(round(100.0 * value / maximum, 2)),
    }


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value

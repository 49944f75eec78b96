"""What happened to a fleet lately: a bounded memory that every provider keeps and `comfyfleet fleet events` shows.

Not the log (which has all of it, for ever) and not an endpoint's log (which says why it scaled).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import FleetEvent

log = structlog.get_logger()

KEPT = 1000


class EventLog:
    """Newest last; the oldest are forgotten."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: deque[FleetEvent] = deque(maxlen=KEPT)

    def add(self, kind: str, text: str, *, node: str = "", worker_id: int = 0) -> None:
        """kind: a dotted name, as in the log."""
        log.info(f"fleet.{kind}", why=text, node=node, worker=worker_id)
        self._kept.append(FleetEvent(at=self._clock.now(), kind=kind, text=text, node=node, worker_id=worker_id))

    def all(self) -> Sequence[FleetEvent]:
        return tuple(self._kept)

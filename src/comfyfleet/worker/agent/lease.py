"""For how long this worker may begin what tickets ask without word of its control plane: a lease, renewed by reports.

A control plane that hears nothing of a worker gives its name to another, and cannot say so to one that is cut off from
it alone. So the worker stops by itself, before that: it takes no new ticket until a report is taken again. What it has
begun it finishes. Counted from when the report was sent, on this machine's own clock, so that no clock need be right
(Gray & Cheriton 1989, "Leases: an efficient fault-tolerant mechanism").
"""

from __future__ import annotations

from comfyfleet.clock import Clock
from comfyfleet.wire.errors import Unavailable


class Lease:
    """Without end until a control plane grants one: older ones do not."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until = float("inf")

    def renew(self, *, sent_at: float, serve_for_s: float) -> None:
        """sent_at: `clock.monotonic()` before the report went out. serve_for_s: what its answer granted, 0 nothing."""
        if serve_for_s > 0:
            self._until = sent_at + serve_for_s

    def demand(self) -> None:
        """Raises Unavailable when it has run out."""
        if self._clock.monotonic() >= self._until:
            raise Unavailable(
                "this worker has not reached its control plane for too long: another may have its place",
                retry_after_s=1.0,
            )

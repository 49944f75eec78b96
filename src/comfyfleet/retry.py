"""Our named backoff policies. Nothing else in the tree decides how long to wait before trying again.

A policy is a value; `delays` turns it into seconds to wait, with full jitter, so that a crowd does not return at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from comfyfleet.ids import Ids


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """first_s, first_s * factor, … up to cap_s, each times a random share in [1 - jitter, 1]; `attempts` in all."""

    first_s: float
    factor: float
    cap_s: float
    attempts: int
    jitter: float = 0.5

    def delays(self, ids: Ids) -> Iterator[float]:
        """The waits between attempts: `attempts - 1` of them."""
        wait_s = self.first_s
        for _ in range(self.attempts - 1):
            yield wait_s * ids.uniform(1.0 - self.jitter, 1.0)
            wait_s = min(wait_s * self.factor, self.cap_s)


# A peer on the same machine or network that is just restarting.
SHORT = Backoff(first_s=0.1, factor=2.0, cap_s=2.0, attempts=6)
# An object store or a download: a minute in all.
TRANSFER = Backoff(first_s=0.5, factor=2.0, cap_s=15.0, attempts=7)
# A file that a job waits for: a stumble of its host, not an outage.
FETCH = Backoff(first_s=0.5, factor=3.0, cap_s=5.0, attempts=3)
# A webhook receiver that is down: about 24 hours in all (Standard Webhooks suggests this order of growth).
HOURS = Backoff(first_s=5.0, factor=4.0, cap_s=6 * 3600.0, attempts=10)
# What costs somebody money until it is cleared away, and nobody waits for: about a week in all.
DAYS = Backoff(first_s=60.0, factor=4.0, cap_s=6 * 3600.0, attempts=40)

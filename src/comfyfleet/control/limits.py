"""Rate limits and quotas per key: a token bucket for requests, a day's GPU-seconds, a number of waiting jobs.

The arithmetic is pure (`take`); `Limits` remembers the buckets in memory, since a restart may forgive a second.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from comfyfleet.control.auth import Principal
from comfyfleet.wire.errors import TooManyRequests

DAY_S = 86_400.0


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens left, as of a time."""

    tokens: float
    at: float


def take(bucket: Bucket | None, now: float, count: float, *, rate: float, burst: float) -> tuple[Bucket, float]:
    """(the bucket afterwards, seconds to wait): 0 s if `count` tokens were taken, else none were."""
    burst = max(burst, 1.0, rate)
    tokens = burst if bucket is None else min(burst, bucket.tokens + max(0.0, now - bucket.at) * rate)
    # More at once than a full bucket holds: let it through on a full one, and into debt.
    needed = min(count, burst)
    if tokens >= needed:
        return Bucket(tokens=tokens - count, at=now), 0.0
    return Bucket(tokens=tokens, at=now), (needed - tokens) / rate


class Limits:
    """What each scope has used lately."""

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}
        self._seconds: dict[str, list[tuple[float, float]]] = {}

    def admit(self, principal: Principal, count: int, now: float) -> None:
        """A request of `count` jobs. Raises TooManyRequests with the true time to wait."""
        rate = principal.limits.requests_per_s
        if rate > 0:
            bucket, wait_s = take(
                self._buckets.get(principal.scope), now, count, rate=rate, burst=principal.limits.burst
            )
            self._buckets[principal.scope] = bucket
            if wait_s > 0:
                raise TooManyRequests(f"over {rate:g} requests a second", retry_after_s=wait_s, limit="requests_per_s")

    def admit_waiting(self, principal: Principal, waiting: int, count: int) -> None:
        """So many jobs of this key wait already."""
        most = principal.limits.max_waiting_jobs
        if most and waiting + count > most:
            raise TooManyRequests(
                f"{waiting} jobs of this key wait; it may have {most}",
                retry_after_s=5.0,
                limit="max_waiting_jobs",
            )

    def admit_seconds(self, principal: Principal, now: float) -> None:
        """The day's GPU-seconds are not used up yet."""
        allowed = principal.limits.gpu_seconds_per_day
        if not allowed:
            return
        used = self._recent(principal.scope, now)
        if sum(seconds for _, seconds in used) >= allowed:
            raise TooManyRequests(
                f"this key has used its {allowed:g} GPU-seconds of the last 24 hours",
                retry_after_s=max(1.0, used[0][0] + DAY_S - now),
                limit="gpu_seconds_per_day",
            )

    def used_seconds(self, scope: str, seconds: float, now: float) -> None:
        """A job of that scope took a GPU that long."""
        self._recent(scope, now).append((now, seconds))

    def remember(self, seconds_by_scope: Mapping[str, float], now: float) -> None:
        """What the ledger says was used in the last day; after a restart it counts as used now."""
        for scope, seconds in seconds_by_scope.items():
            self.used_seconds(scope, seconds, now)

    def _recent(self, scope: str, now: float) -> list[tuple[float, float]]:
        kept = [entry for entry in self._seconds.get(scope, []) if entry[0] > now - DAY_S]
        self._seconds[scope] = kept
        return kept

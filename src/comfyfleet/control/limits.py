"""Rate limits and quotas per key: a token bucket for requests, a day's GPU-seconds, a number of waiting requests.

A durable job over a limit is refused with 429 (`admit…`). A caller of `/route/` cannot be told so: the public client
takes every status but 200 for the end of its request. There the same buckets hold the key's requests back in their line
(`Allowance`), and the waiting answer says why and for how long.

The arithmetic is pure (`take`); `Limits` remembers the buckets in memory, since a restart may forgive a second.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from comfyfleet.control.auth import Principal
from comfyfleet.control.records import KeyLimits
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
        self._seconds: dict[str, _Day] = {}

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
        wait_s = self.quota_wait_s(principal.scope, allowed, now)
        if wait_s > 0:
            raise TooManyRequests(_quota_text(allowed), retry_after_s=wait_s, limit="gpu_seconds_per_day")

    def quota_wait_s(self, scope: str, allowed: float, now: float) -> float:
        """How long until some of the day's GPU-seconds are back; 0 while some are left (or none are limited)."""
        day = self._seconds.get(scope)
        if not allowed or day is None or day.total(now) < allowed:
            return 0.0
        return max(1.0, day.oldest_at + DAY_S - now)

    def token_wait_s(self, scope: str, limits: KeyLimits, now: float) -> float:
        """How long until this key's next request may go; takes nothing."""
        if limits.requests_per_s <= 0:
            return 0.0
        return take(self._buckets.get(scope), now, 1, rate=limits.requests_per_s, burst=limits.burst)[1]

    def take_token(self, scope: str, limits: KeyLimits, now: float) -> None:
        """One of this key's requests goes."""
        if limits.requests_per_s > 0:
            bucket = self._buckets.get(scope)
            self._buckets[scope], _ = take(bucket, now, 1, rate=limits.requests_per_s, burst=limits.burst)

    def used_seconds(self, scope: str, seconds: float, now: float) -> None:
        """A job of that scope took a GPU that long."""
        self._seconds.setdefault(scope, _Day()).add(seconds, now)

    def remember(self, seconds_by_scope: Mapping[str, float], now: float) -> None:
        """What the ledger says was used in the last day; after a restart it counts as used now."""
        for scope, seconds in seconds_by_scope.items():
            self.used_seconds(scope, seconds, now)


class _Day:
    """GPU-seconds of the last 24 hours, summed up by the minute."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[float, float]] = deque()  # (when the first of them was used, seconds)
        self._sum = 0.0

    def add(self, seconds: float, now: float) -> None:
        if self._minutes and now - self._minutes[-1][0] < 60.0:
            at, before = self._minutes.pop()
            self._minutes.append((at, before + seconds))
        else:
            self._minutes.append((now, seconds))
        self._sum += seconds

    def total(self, now: float) -> float:
        while self._minutes and self._minutes[0][0] <= now - DAY_S:
            self._sum -= self._minutes.popleft()[1]
        return self._sum if self._minutes else 0.0

    @property
    def oldest_at(self) -> float:
        return self._minutes[0][0] if self._minutes else 0.0


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """Why a key's requests are passed over now, and for how many seconds."""

    reason: str
    wait_s: float


class Allowance:
    """What `/route/` may hand to whom, by the limits of the key with that scope."""

    def __init__(self, limits: Limits, limits_of: Callable[[str], KeyLimits]) -> None:
        self._limits = limits
        self._limits_of = limits_of

    def weight(self, scope: str) -> float:
        return self._limits_of(scope).weight

    def is_limited(self, scope: str) -> bool:
        limits = self._limits_of(scope)
        return limits.requests_per_s > 0 or limits.gpu_seconds_per_day > 0

    def most_waiting(self, scope: str) -> int:
        """How many requests of this key may wait at once; 0: as many as come."""
        return self._limits_of(scope).max_waiting_jobs

    def hold(self, scope: str, now: float) -> Hold | None:
        """None: the key's next request may go."""
        limits = self._limits_of(scope)
        if wait_s := self._limits.quota_wait_s(scope, limits.gpu_seconds_per_day, now):
            return Hold(reason=_quota_text(limits.gpu_seconds_per_day), wait_s=wait_s)
        if wait_s := self._limits.token_wait_s(scope, limits, now):
            return Hold(
                reason=f"this key sends more than its {limits.requests_per_s:g} requests a second", wait_s=wait_s
            )
        return None

    def soon(self, scope: str, within_s: float, now: float) -> int:
        """How many requests of a key that is held back may go within so many seconds."""
        limits = self._limits_of(scope)
        if self._limits.quota_wait_s(scope, limits.gpu_seconds_per_day, now) > within_s:
            return 0
        return math.ceil(limits.requests_per_s * within_s) if limits.requests_per_s > 0 else 1

    def took(self, scope: str, now: float) -> None:
        """A request of this key got a worker."""
        self._limits.take_token(scope, self._limits_of(scope), now)


def _quota_text(allowed: float) -> str:
    return f"this key has used its {allowed:g} GPU-seconds of the last 24 hours"

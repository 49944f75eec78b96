"""Rate limits and quotas per key: a token bucket for requests, a day's GPU-seconds, a number of waiting requests.

A durable job over a limit is refused with 429 (`admit…`). A caller of `/route/` cannot be told so: the public client
takes every status but 200 for the end of its request. There the same buckets hold the key's requests back in their line
(`Allowance`), and the waiting answer says why and for how long.

The arithmetic is pure (`take`); `Limits` remembers the buckets in memory, since a restart may forgive a second.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from comfyfleet.control.auth import Principal
from comfyfleet.control.records import KeyLimits, ScopeUse
from comfyfleet.wire.errors import TooManyRequests

DAY_S = 86_400.0
# When to ask again where a day is full of jobs that have not run yet.
_PROMISED_S = 60.0


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

    def __init__(self, limits_of: Callable[[str], KeyLimits] = lambda _scope: KeyLimits()) -> None:
        """limits_of: the limits of the key with that scope."""
        self.promised: Callable[[str], float] = lambda _scope: 0.0  # GPU-seconds that accepted jobs will take
        self._limits_of = limits_of
        self._buckets: dict[str, Bucket] = {}
        self._seconds: dict[str, _Day] = {}
        self._own: dict[str, ScopeUse] = {}  # used here, and not told to other replicas yet
        self._arriving: dict[str, tuple[int, float]] = {}  # (jobs, GPU-seconds) that are being stored now

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
            self._note(principal.scope, requests=count)

    def admit_waiting(self, principal: Principal, waiting: int, count: int) -> None:
        """So many jobs of this key wait already."""
        most = principal.limits.max_waiting_jobs
        waiting += self._arriving.get(principal.scope, (0, 0.0))[0]
        if most and waiting + count > most:
            raise TooManyRequests(
                f"{waiting} jobs of this key wait; it may have {most}",
                retry_after_s=5.0,
                limit="max_waiting_jobs",
            )

    def admit_seconds(self, principal: Principal, now: float, *, count: int = 1, seconds: float = 0.0) -> None:
        """The day's GPU-seconds have room for `count` jobs that are predicted to take so many.

        What was used, what accepted jobs will take and what these will take count together. A single job is let
        through while nothing else counts, however long it is thought to take: it could never run otherwise.
        """
        scope, allowed = principal.scope, principal.limits.gpu_seconds_per_day
        if not allowed:
            return
        taken = self._taken(scope, now)
        if taken < allowed and (taken + seconds <= allowed or (count == 1 and not taken)):
            return
        text = _quota_text(allowed, self._used(scope, now))
        if seconds:
            text += f"; what it asks for is thought to take {seconds:.3g}"
        raise TooManyRequests(text, retry_after_s=self._back_in_s(scope, now), limit="gpu_seconds_per_day")

    def quota_wait_s(self, scope: str, allowed: float, now: float) -> float:
        """How long until some of the day's GPU-seconds are back; 0 while some are left (or none are limited)."""
        if not allowed or self._taken(scope, now) < allowed:
            return 0.0
        return self._back_in_s(scope, now)

    def quota_text(self, scope: str, allowed: float, now: float) -> str:
        """Why a key that is out of its GPU-seconds has to wait."""
        return _quota_text(allowed, self._used(scope, now))

    @contextmanager
    def arriving(self, scope: str, count: int, seconds: float) -> Iterator[None]:
        """Jobs that were admitted and are being stored: whoever is admitted meanwhile counts them as well."""
        jobs, before = self._arriving.get(scope, (0, 0.0))
        self._arriving[scope] = (jobs + count, before + seconds)
        try:
            yield
        finally:
            jobs, before = self._arriving[scope]
            self._arriving[scope] = (jobs - count, before - seconds)
            if jobs == count:
                del self._arriving[scope]

    def _used(self, scope: str, now: float) -> float:
        day = self._seconds.get(scope)
        return 0.0 if day is None else day.total(now)

    def _taken(self, scope: str, now: float) -> float:
        return self._used(scope, now) + self.promised(scope) + self._arriving.get(scope, (0, 0.0))[1]

    def _back_in_s(self, scope: str, now: float) -> float:
        """When the first of the used seconds are a day old; with none used, open jobs may take less than thought."""
        day = self._seconds.get(scope)
        return max(1.0, day.oldest_at + DAY_S - now) if day is not None and day.total(now) > 0 else _PROMISED_S

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
            self._note(scope, requests=1)

    def used_seconds(self, scope: str, seconds: float, now: float) -> None:
        """A job of that scope took a GPU that long."""
        self._seconds.setdefault(scope, _Day()).add(seconds, now)
        self._note(scope, seconds=seconds)

    def remember(self, seconds_by_scope: Mapping[str, float], at: float) -> None:
        """What the ledger says was used until then: earlier times first, and before anything is used now."""
        for scope, seconds in seconds_by_scope.items():
            self._seconds.setdefault(scope, _Day()).add(seconds, at)

    # --- several control planes ----------------------------------------------------------------------------------
    def take_own(self) -> dict[str, ScopeUse]:
        """What was used here since the last call, by scope."""
        own, self._own = self._own, {}
        return own

    def give_back(self, own: Iterable[ScopeUse]) -> None:
        """What `take_own` gave could not be told."""
        for used in own:
            self._note(used.scope, requests=used.requests, seconds=used.seconds)

    def others_used(self, used: ScopeUse, now: float) -> None:
        """At other replicas: off this one's bucket, into debt if need be, and off the day."""
        limits = self._limits_of(used.scope)
        if used.requests > 0 and limits.requests_per_s > 0:
            bucket, _ = take(self._buckets.get(used.scope), now, 0, rate=limits.requests_per_s, burst=limits.burst)
            self._buckets[used.scope] = Bucket(tokens=bucket.tokens - used.requests, at=now)
        if used.seconds > 0:
            self._seconds.setdefault(used.scope, _Day()).add(used.seconds, now)

    def _note(self, scope: str, *, requests: float = 0.0, seconds: float = 0.0) -> None:
        known = self._own.get(scope, ScopeUse(scope=scope))
        self._own[scope] = ScopeUse(scope=scope, requests=known.requests + requests, seconds=known.seconds + seconds)


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
            return Hold(reason=self._limits.quota_text(scope, limits.gpu_seconds_per_day, now), wait_s=wait_s)
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


def _quota_text(allowed: float, used: float) -> str:
    if used >= allowed:
        return f"this key has used its {allowed:g} GPU-seconds of the last 24 hours"
    return (
        f"this key has used {used:.3g} of its {allowed:g} GPU-seconds of the last 24 hours; its open jobs take the rest"
    )

"""Whose turn it is at an endpoint: weighted fair queueing between keys, by predicted GPU-seconds. Pure.

Each scope has a virtual time: the GPU-seconds it was given, divided by its weight. The scope with the smallest goes
next, so a key with ten thousand requests cannot starve one with two. One that was idle starts level with those that
wait: idling earns nothing. One account serves both doors, the callers of `/route/` and the durable jobs; either asks
with whom it has waiting. Inside a scope the order is first in, first out (or the store's `rank`).
"""

from __future__ import annotations

from collections.abc import Collection

# Accounts kept beyond those that still say something.
KEPT_SCOPES = 10_000


class FairShare:
    """The virtual times of one endpoint."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._level = 0.0  # the virtual time at which the last turn began
        self._full_at = KEPT_SCOPES  # so many accounts are looked through for those that say nothing any more

    def next(self, waiting: Collection[str]) -> str | None:
        """The scope whose turn it is; None if nobody waits. Ties go by name, so a replay decides alike."""
        if not waiting:
            return None
        times, level = self._times, self._level
        # Who waited all along is never behind the level; the others start where the first of those stands.
        late = [scope for scope in waiting if times.get(scope, -1.0) < level]
        if late:
            start = min((time for scope in waiting if (time := times.get(scope, -1.0)) >= level), default=level)
            for scope in late:
                times[scope] = start
        return min(waiting, key=lambda scope: (times[scope], scope))

    def served(self, scope: str, work: float, weight: float = 1.0) -> None:
        """Work of that much was handed out to a worker. Work: GPU-seconds."""
        began = max(self._times.get(scope, self._level), self._level)
        self._level = began
        self._times[scope] = began + work / (weight if weight > 0 else 1.0)
        if len(self._times) > self._full_at:
            self._times = {scope: time for scope, time in self._times.items() if time > self._level}
            # Where all still say something, not at every turn.
            self._full_at = max(KEPT_SCOPES, 2 * len(self._times))

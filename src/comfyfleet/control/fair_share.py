"""Whose job is next: weighted fair queueing between keys, by predicted GPU-seconds. Pure.

Each scope has a virtual time: the work it was given, divided by its weight. The scope with the smallest goes next, so a
key with ten thousand jobs cannot starve one with two. One that was idle starts level with the others: idling earns
nothing. Inside a scope the store's `rank` decides (priority, then age).
"""

from __future__ import annotations

from collections.abc import Collection


class FairShare:
    """The virtual times of one endpoint."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._active: frozenset[str] = frozenset()

    def next(self, waiting: Collection[str]) -> str | None:
        """The scope whose turn it is; None if nobody waits. Ties go by name, so a replay decides alike."""
        stayed = [self._times[scope] for scope in waiting if scope in self._active]
        level = min(stayed, default=max(self._times.values(), default=0.0))
        for scope in waiting:
            if scope not in self._active:
                self._times[scope] = max(self._times.get(scope, 0.0), level)
        self._active = frozenset(waiting)
        if not waiting:
            return None
        return min(waiting, key=lambda scope: (self._times[scope], scope))

    def served(self, scope: str, work: float, weight: float = 1.0) -> None:
        """A job of that much work was handed out."""
        self._times[scope] = self._times.get(scope, 0.0) + work / (weight if weight > 0 else 1.0)

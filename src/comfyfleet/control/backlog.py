"""How much durable work waits and runs, per endpoint and key, in memory: no loop asks the database for what it knows.

Kept up as jobs come and go, and replaced by the store's own sums now and then, which mends any drift.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from comfyfleet.control.jobs import Job, Waiting


@dataclass(kw_only=True)
class Amount:
    """Jobs, their load units, and when the oldest was accepted."""

    jobs: int = 0
    cost: float = 0.0
    oldest_at: float = 0.0


class Backlog:
    """Amounts by endpoint and scope."""

    def __init__(self) -> None:
        self._amounts: dict[int, dict[str, Amount]] = {}
        self._running: dict[tuple[int, str], float] = {}  # cost by endpoint and scope
        self._meanwhile: list[tuple[int, str, float, float]] = []

    def begin_sync(self) -> None:
        """The store is about to be asked: from now on, remember what its answer may lack."""
        self._meanwhile = []

    def replace(self, waiting: Iterable[Waiting]) -> None:
        """Take the store's sums, and what came since `begin_sync`. Counting a job twice only costs a look."""
        self._amounts = {}
        for row in waiting:
            amount = Amount(jobs=row.jobs, cost=row.cost, oldest_at=row.oldest_at)
            self._amounts.setdefault(row.endpoint_id, {})[row.scope] = amount
        meanwhile, self._meanwhile = self._meanwhile, []
        for added in meanwhile:
            self.add(*added)

    def add(self, endpoint_id: int, scope: str, cost: float, at: float) -> None:
        self._meanwhile.append((endpoint_id, scope, cost, at))
        amount = self._amounts.setdefault(endpoint_id, {}).setdefault(scope, Amount(oldest_at=at))
        amount.jobs += 1
        amount.cost += cost
        amount.oldest_at = min(amount.oldest_at, at)

    def remove(self, endpoint_id: int, scope: str, cost: float) -> None:
        amounts = self._amounts.get(endpoint_id, {})
        amount = amounts.get(scope)
        if amount is None:
            return
        amount.jobs -= 1
        amount.cost = max(0.0, amount.cost - cost)
        if amount.jobs <= 0:
            del amounts[scope]

    def began(self, endpoint_id: int, scope: str, cost: float) -> None:
        """A job waits no more: it runs."""
        self.remove(endpoint_id, scope, cost)
        self._running[endpoint_id, scope] = self._running.get((endpoint_id, scope), 0.0) + cost

    def ended(self, endpoint_id: int, scope: str, cost: float) -> None:
        """A job runs no more."""
        left = self._running.pop((endpoint_id, scope), 0.0) - cost
        if left > 1e-6:
            self._running[endpoint_id, scope] = left

    def replace_running(self, jobs: Iterable[Job]) -> None:
        """Take the store's word for what runs."""
        self._running = {}
        for job in jobs:
            named = (job.endpoint_id, job.scope)
            self._running[named] = self._running.get(named, 0.0) + job.cost

    def open_costs(self, scope: str) -> list[tuple[int, float]]:
        """(endpoint, load units) of one key's jobs that wait or run."""
        waiting = [(of, amounts[scope].cost) for of, amounts in self._amounts.items() if scope in amounts]
        return waiting + [(of, cost) for (of, runs_for), cost in self._running.items() if runs_for == scope]

    def scopes(self, endpoint_id: int) -> list[str]:
        """Who has something waiting."""
        return list(self._amounts.get(endpoint_id, ()))

    def of_scope(self, scope: str) -> int:
        """Jobs of one key, at all endpoints."""
        return sum(amounts[scope].jobs for amounts in self._amounts.values() if scope in amounts)

    def total(self, endpoint_id: int) -> Amount:
        """All keys of an endpoint."""
        amounts = self._amounts.get(endpoint_id, {}).values()
        return Amount(
            jobs=sum(amount.jobs for amount in amounts),
            cost=sum(amount.cost for amount in amounts),
            oldest_at=min((amount.oldest_at for amount in amounts), default=0.0),
        )

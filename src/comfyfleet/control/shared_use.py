"""Keys' limits over several control planes: each tells the database what its keys used, and hears of the others'.

Sums that only grow, one row per key. What others used is taken from this replica's buckets a moment later, into debt
where need be: so a key's rate and its day hold over all replicas in the long run, and before they have told each other
each may let through its own burst and one second's rate, once.
"""

from __future__ import annotations

import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.limits import Limits
from comfyfleet.control.records import ScopeUse
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost

log = structlog.get_logger()

EVERY_S = 1.0


class SharedUse:
    """The loop of one replica."""

    def __init__(self, *, store: Store, limits: Limits, clock: Clock) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._seen: dict[str, ScopeUse] | None = None  # the sums so far, ours included

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.step()
            except ConnectionLost as error:
                log.info("shared_use.waits_for_database", why=str(error).strip())
            except Exception:  # one iteration
                log.exception("shared_use.failed")
            await self._clock.sleep(EVERY_S)

    async def step(self) -> None:
        """Tell and hear once. What was there before this replica is in the ledger, which it read at its start."""
        own = self._limits.take_own()
        try:
            sums = {row.scope: row for row in await self._store.share_use(list(own.values()))}
        except ConnectionLost:
            self._limits.give_back(own.values())
            raise
        before, self._seen = self._seen, sums
        if before is None:
            return
        now = self._clock.now()
        for scope, total in sums.items():
            known, ours = before.get(scope, ScopeUse(scope=scope)), own.get(scope, ScopeUse(scope=scope))
            self._limits.others_used(
                ScopeUse(
                    scope=scope,
                    requests=total.requests - known.requests - ours.requests,
                    seconds=total.seconds - known.seconds - ours.seconds,
                ),
                now,
            )

"""Keeps this replica's copies of records (endpoints, workergroups, templates, keys, variables) like the database's.

Another replica may have changed them: every roll says how often they changed, and whoever is about to say "there is no
such thing" looks again first. A lone control plane has no mirror: what it writes is what there is.
"""

from __future__ import annotations

import anyio
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.account import Account, built_in_templates
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.keys import Keyring
from comfyfleet.control.records import AccountVariable, ApiKey, Endpoint, Template, Workergroup
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost

log = structlog.get_logger()


async def load_records(store: Store, catalog: Catalog, keyring: Keyring, account: Account) -> None:
    """All copies anew, as the database has them."""
    endpoints, groups = await store.all(Endpoint), await store.all(Workergroup)
    templates, keys = await store.all(Template), await store.all(ApiKey)
    variables = await store.all(AccountVariable)
    catalog.replace(endpoints, groups, [*built_in_templates(), *templates])
    keyring.replace(keys)
    account.replace(variables)


class RecordMirror:
    """`refresh` before an answer that must be of now; `run` follows the rolls."""

    def __init__(self, *, store: Store, catalog: Catalog, keyring: Keyring, account: Account, clock: Clock) -> None:
        self._store = store
        self._catalog = catalog
        self._keyring = keyring
        self._account = account
        self._clock = clock
        self._version = -1
        self._looked_at = self._failed_at = float("-inf")
        self._lock = anyio.Lock()
        self._behind = anyio.Event()

    def told(self, version: int) -> None:
        """A roll was read."""
        if version != self._version:
            self._behind.set()

    async def run(self) -> None:
        while True:
            await self._behind.wait()
            self._behind = anyio.Event()
            try:
                await self.refresh()
            except Exception:  # one iteration: the next roll asks again
                log.exception("records.refresh_failed")
                await self._clock.sleep(0.5)

    @property
    def version(self) -> int:
        """Of the copies: take it before looking at them, for `refresh` to say whether that look is old."""
        return self._version

    async def refresh(self, seen: int | None = None) -> bool:
        """Read again what changed; True when the copies may be others than those of version `seen` (None: of now).

        Callers at the same time share one look, also one that fails. Raises ConnectionLost.
        """
        seen = self._version if seen is None else seen
        asked_at = self._clock.monotonic()
        async with self._lock:
            if self._looked_at > asked_at:
                return True
            if self._failed_at > asked_at:
                raise ConnectionLost("the database did not answer a moment ago")
            looked_at = self._clock.monotonic()
            try:
                version = await self._store.records_version()
            except ConnectionLost:
                self._failed_at = self._clock.monotonic()
                raise
            self._looked_at = looked_at
            if version != self._version:
                # The version was read first, so that a change in between is seen again.
                await load_records(self._store, self._catalog, self._keyring, self._account)
                self._version = version
            return version != seen

"""Replicas and what they own, in the database: every method one transaction. See `control.ownership` for the rules.

The database's clock alone decides whose lease is over. A lease that is over is ended by deleting its row, and a renewal
only ever updates a row: the row's lock makes one of the two see the other, so a lease is either renewed or over, never
both. Ids are not used twice, so whoever is off the roll stays off, and a deed that names them is free for good.
Taking is a compare-and-swap on the fence.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from comfyfleet.control.ownership import Deed, Fence, Replica, Roll
from comfyfleet.control.records import ScopeUse
from comfyfleet.control.store import sql
from comfyfleet.control.store.connection import Connection
from comfyfleet.control.store.writer import Database

# The counter that grows with every change of a record (workers' rows apart, which only their owner reads).
RECORDS = "record version"


class Fenced(Exception):
    """The endpoint has another owner by now: nothing was written."""


def check_fence(connection: Connection, fence: Fence | None) -> None:
    """Inside a transaction: hold the endpoint for its owner until the end of it. Raises Fenced."""
    if fence is None:
        return
    statement = sql.HOLD_DEED + connection.share_lock
    if not connection.rows(statement, {"endpoint_id": fence.endpoint_id, "fence": fence.number}):
        raise Fenced(f"endpoint {fence.endpoint_id} has another owner than the one of fence {fence.number}")


class OwnershipTable:
    """Leases of replicas, deeds of endpoints, and the secrets that all replicas share."""

    _database: Database

    async def enrol(self, replica: Replica, lease_s: float) -> None:
        """A new name on the roll."""
        params = {"id": replica.id, "url": replica.url, "fleet": replica.fleet, "lease_s": lease_s}
        await self._database.write(lambda connection: connection.change(_timed(sql.ENROL, connection), params))

    async def attend(self, replica_id: str, lease_s: float) -> Roll:
        """Renew, strike off those whose lease is over, and read the roll."""

        def work(connection: Connection) -> Roll:
            mine = {"id": replica_id, "lease_s": lease_s}
            is_present = connection.change(_timed(sql.RENEW_REPLICA, connection), mine) == 1
            connection.change(_timed(sql.STRIKE_OFF, connection), {})
            version = connection.rows(sql.COUNTER, {"name": RECORDS})
            return Roll(
                is_present=is_present,
                replicas=tuple(
                    Replica(id=of, url=url, fleet=fleet) for of, url, fleet in connection.rows(sql.ROLL, {})
                ),
                deeds=tuple(
                    Deed(endpoint_id=endpoint_id, replica_id=of, fence=fence)
                    for endpoint_id, of, fence in connection.rows(sql.DEEDS, {})
                ),
                version=int(version[0][0]) if version else 0,
            )

        return await self._database.write(work)

    async def take(self, replica_id: str, wanted: Sequence[tuple[int, int]]) -> list[Fence]:
        """Endpoints, each with the fence that was seen; returns those that were still free, with their new fences."""

        def work(connection: Connection) -> list[Fence]:
            taken = []
            for endpoint_id, seen in sorted(wanted):
                params = {"endpoint_id": endpoint_id, "replica_id": replica_id, "seen": seen}
                rows = connection.rows(sql.TAKE_DEED if seen else sql.FIRST_DEED, params)
                taken += [Fence(endpoint_id=endpoint_id, number=int(row[0])) for row in rows]
            return taken

        return await self._database.write(work)

    async def release(self, fences: Sequence[Fence]) -> None:
        """Let endpoints go; nothing happens to those that were taken meanwhile."""
        params = [{"endpoint_id": fence.endpoint_id, "fence": fence.number} for fence in fences]
        await self._database.write(lambda connection: connection.change_many(sql.RELEASE_DEED, params))

    async def leave(self, replica_id: str) -> None:
        """Off the roll: all it owned is free."""
        await self._database.write(lambda connection: connection.change(sql.LEAVE, {"id": replica_id}))

    async def share_use(self, used: Sequence[ScopeUse]) -> list[ScopeUse]:
        """Add to the sums, and read them all."""

        def work(connection: Connection) -> list[ScopeUse]:
            if used:  # in one order, so that no two replicas wait for each other
                ordered = sorted(used, key=lambda one: one.scope)
                connection.change_many(sql.ADD_USE, [msgspec.structs.asdict(one) for one in ordered])
            rows = connection.rows(sql.ALL_USE, {})
            return [ScopeUse(scope=scope, requests=requests, seconds=seconds) for scope, requests, seconds in rows]

        return await self._database.write(work)

    async def records_version(self) -> int:
        """Grows with every change of a record."""
        rows = await self._database.read(lambda connection: connection.rows(sql.COUNTER, {"name": RECORDS}), quick=True)
        return int(rows[0][0]) if rows else 0

    async def agree_on_secret(self, name: str, sealed: str) -> str:
        """The sealed secret that every replica uses: this one, if it is the first."""

        def work(connection: Connection) -> str:
            connection.change(sql.FIRST_SHARED, {"id": name, "body": sealed})
            return str(connection.rows(sql.SHARED, {"id": name})[0][0])

        return await self._database.write(work)

    async def secret(self, name: str) -> str | None:
        """The sealed secret, if there is one."""
        rows = await self._database.read(lambda connection: connection.rows(sql.SHARED, {"id": name}))
        return str(rows[0][0]) if rows else None


def _timed(statement: str, connection: Connection) -> str:
    """With the database's own clock, which the two write differently."""
    return statement.replace("{now}", connection.now)

"""One control plane among several on a database: the loop that renews its lease, takes endpoints and gives them away.

Fetch (the roll), decide (`ownership.plan`), act (load or drop what is known of an endpoint), record (the store's
guarded updates). An endpoint is acted for only after the store gave it and its workers are loaded; it is let go of
before the store hears of it. When the database is away the lease runs out by itself and everything pauses; what is
known is kept, and is good again if nobody else had the endpoint meanwhile, which its fence tells.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import anyio
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.ownership import LEASE_S, RENEW_EVERY_S, Fence, NotOwner, Replica, Roll, Tenure, plan
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.ids import Ids

log = structlog.get_logger()

FLEET_CLASH = (
    "replica {url} starts workers from another place ({theirs}); replicas with a local fleet share one data "
    "directory on one machine: use --fleet ray, or --fleet none"
)


class FleetClash(Exception):
    """Two replicas whose fleets could not take each other's workers over."""


class Territory(Protocol):
    """What is kept in memory for an endpoint that is ours."""

    async def load(self, endpoint_ids: Collection[int]) -> None:
        """From the store, before anything is done for them."""
        ...

    def begin(self, endpoint_id: int) -> None:
        """It is ours from now on: go on with its jobs."""
        ...

    def drop(self, endpoint_id: int) -> None:
        """It is another's: forget it, and send its callers away."""
        ...


class Replicas:
    """Implements `ownership.Ownership`. `enrol` before serving, `run` is the loop, `leave` at the end."""

    is_shared = True

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        url: str,
        fleet: str,
        territory: Territory,
        records_changed: Callable[[int], object],
        clock: Clock,
        ids: Ids,
    ) -> None:
        """records_changed: called with each roll's version of the records."""
        self.url = url
        self.roll = Roll(is_present=False)
        self.is_database_away = False
        self._store = store
        self._catalog = catalog
        self._fleet = fleet
        self._territory = territory
        self._records_changed = records_changed
        self._clock = clock
        self._ids = ids
        self._tenure = Tenure("")
        self._remembered: dict[int, int] = {}  # endpoint -> the fence under which what we know of it was true
        self._changed = anyio.Event()
        self._kicked = anyio.Event()
        self._watchers: dict[int, set[anyio.CancelScope]] = {}

    # --- what others ask -----------------------------------------------------------------------------------------
    @property
    def id(self) -> str:
        """Of this life: a lease that was lost is followed by another id."""
        return self._tenure.id

    def owns(self, endpoint_id: int) -> bool:
        return self._tenure.owns(endpoint_id, self._clock.monotonic())

    def fence(self, endpoint_id: int) -> Fence | None:
        fence = self._tenure.fence(endpoint_id)
        if fence is None:
            raise NotOwner(endpoint_id)
        return fence

    def why_unfit(self) -> str:
        """Why nothing can be served here now, or "": only who is on the roll may own, forward and answer."""
        if self._tenure.is_standing(self._clock.monotonic()):
            return ""
        return "the database is away" if self.is_database_away else "not yet among the control planes of its database"

    def owned(self) -> list[int]:
        """Endpoints that this replica may act for now."""
        return [endpoint_id for endpoint_id in self._tenure.held() if self.owns(endpoint_id)]

    def owner_of(self, endpoint_id: int) -> Replica | None:
        """Another replica that owned it when last looked at; None for ourselves, or nobody."""
        owner = self.roll.owners().get(endpoint_id)
        return None if owner is None or owner.id == self._tenure.id else owner

    def others(self) -> list[Replica]:
        return [replica for replica in self.roll.replicas if replica.id != self._tenure.id]

    async def changed(self, at_most_s: float) -> None:
        """Until something about ownership is new."""
        with anyio.move_on_after(at_most_s):
            await self._changed.wait()

    def watch(self, endpoint_id: int, scope: anyio.CancelScope) -> Callable[[], None]:
        """Cancel the scope when the endpoint's owner changes; call what is returned when that is of no interest."""
        self._watchers.setdefault(endpoint_id, set()).add(scope)

        def forget() -> None:
            scopes = self._watchers.get(endpoint_id, set())
            scopes.discard(scope)
            if not scopes:
                self._watchers.pop(endpoint_id, None)

        return forget

    def kick(self) -> None:
        """Look at the roll at once: an owner does not answer, or an endpoint is new."""
        self._kicked.set()

    # --- the loop ------------------------------------------------------------------------------------------------
    async def enrol(self) -> None:
        """A new life on the roll. Raises FleetClash."""
        tenure = Tenure(self._ids.request_id())
        await self._store.enrol(Replica(id=tenure.id, url=self.url, fleet=self._fleet), LEASE_S)
        self._tenure = tenure
        await self._attend()
        for other in self.others():
            if self._fleet.startswith("local") and other.fleet.startswith("local") and other.fleet != self._fleet:
                await self._store.leave(tenure.id)
                raise FleetClash(FLEET_CLASH.format(url=other.url, theirs=other.fleet))
        log.info("replica.enrolled", replica=tenure.id, url=self.url, others=len(self.others()))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.step()
            with anyio.move_on_after(RENEW_EVERY_S):
                await self._kicked.wait()
            self._kicked = anyio.Event()
            await self._clock.sleep(0.05)  # however often it is kicked

    async def step(self) -> None:
        """One pass."""
        try:
            if not self._tenure.id:
                await self.enrol()
            else:
                await self._attend()
            await self._act()
            if self.is_database_away:
                log.info("replica.database_back", owned=len(self._tenure.held()))
            self.is_database_away = False
        except ConnectionLost as error:
            if not self.is_database_away:
                log.warning("replica.database_away", why=str(error))
            self.is_database_away = True
        except Exception:  # loop iteration boundary
            log.exception("replica.failed")

    async def leave(self) -> None:
        """In order: everything is let go of, then the others may have it."""
        self.roll = msgspec.structs.replace(self.roll, replicas=tuple(self.others()))
        tenure, self._tenure = self._tenure, Tenure("")
        for endpoint_id in tenure.held():
            self._territory.drop(endpoint_id)
        try:
            await self._store.leave(tenure.id)
        except ConnectionLost as error:
            log.warning("replica.left_unsaid", why=str(error))  # the lease runs out by itself

    async def _attend(self) -> None:
        sent_at = self._clock.monotonic()
        roll = await self._store.attend(self._tenure.id, LEASE_S)
        before, self.roll = self.roll, roll
        gone = self._tenure.attended(roll, sent_at)
        if not roll.is_present:
            log.warning("replica.lease_lost", replica=self._tenure.id, endpoints=gone)
            self._tenure = Tenure("")
            return await self.enrol()
        self._settle()
        self._tell(before)
        self._records_changed(roll.version)
        return None

    async def _act(self) -> None:
        """Take what is free and due to us; give what is too much."""
        mine = {deed.endpoint_id: deed.fence for deed in self.roll.deeds if deed.replica_id == self._tenure.id}
        # Ours by the store and not by us: its answer was lost, or loading failed.
        stray = [
            Fence(endpoint_id=endpoint_id, number=number)
            for endpoint_id, number in mine.items()
            if endpoint_id not in self._tenure.held()
        ]
        living = [endpoint.id for endpoint in self._catalog.endpoints()]
        decided = plan(self.roll, self._tenure.id, living)
        taken = await self._store.take(self._tenure.id, decided.take) if decided.take else []
        await self._gain([*stray, *taken])
        if decided.give:
            given = self._tenure.gives(decided.give)
            for fence in given:
                self._forget(fence.endpoint_id)
            await self._store.release(given)
            log.info("replica.gave", endpoints=[fence.endpoint_id for fence in given])
        if taken or stray or decided.give:
            self._announce()

    async def _gain(self, fences: Sequence[Fence]) -> None:
        """What was known under the fence just before is still true; anything older is not."""
        new = [fence for fence in fences if self._remembered.get(fence.endpoint_id) != fence.number - 1]
        for fence in new:
            self._forget(fence.endpoint_id)
        if new:
            await self._territory.load([fence.endpoint_id for fence in new])
        for fence in fences:
            self._remembered[fence.endpoint_id] = fence.number
            self._tenure.took(fence)
        for fence in new:
            self._territory.begin(fence.endpoint_id)
        if fences:
            log.info("replica.owns", endpoints=[fence.endpoint_id for fence in fences], resumed=len(fences) - len(new))

    def _settle(self) -> None:
        """Forget what another owns or owned since."""
        fences = {deed.endpoint_id: deed for deed in self.roll.deeds}
        for endpoint_id, known in list(self._remembered.items()):
            deed = fences.get(endpoint_id)
            if deed is None or deed.fence != known:
                self._forget(endpoint_id)

    def _forget(self, endpoint_id: int) -> None:
        if self._remembered.pop(endpoint_id, None) is not None:
            self._territory.drop(endpoint_id)

    def _tell(self, before: Roll) -> None:
        """Wake who waits for an owner, and whoever waits for an answer of one that is none any more."""
        was = {endpoint_id: owner.id for endpoint_id, owner in before.owners().items()}
        now = {endpoint_id: owner.id for endpoint_id, owner in self.roll.owners().items()}
        if was == now:
            return
        for endpoint_id in was.keys() | now.keys():
            if was.get(endpoint_id) != now.get(endpoint_id):
                for scope in list(self._watchers.get(endpoint_id, ())):
                    scope.cancel()
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

"""The loop of a control plane among several, two of them on one database in one process; and what they agree on."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import pytest

from comfyfleet.clock import SystemClock
from comfyfleet.control.account import Account
from comfyfleet.control.app import condition_of
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.condition import Condition
from comfyfleet.control.job_feed import JobFeed
from comfyfleet.control.keys import Keyring, Vault, digest
from comfyfleet.control.ownership import NotOwner
from comfyfleet.control.record_mirror import RecordMirror
from comfyfleet.control.records import AccountVariable, ApiKey, Endpoint, WorkerRow
from comfyfleet.control.replicas import FleetClash, Replicas
from comfyfleet.control.shared_secrets import SHARED, OtherMasterKey, share_secrets
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.store.ownership_table import Fenced
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.ids import SeededIds
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import Unauthorized

pytestmark = pytest.mark.anyio


class Memory:
    """What is kept of endpoints, as a record of what was asked of it."""

    def __init__(self) -> None:
        self.loaded: list[int] = []
        self.begun: list[int] = []
        self.dropped: list[int] = []

    async def load(self, endpoint_ids) -> None:
        self.loaded += endpoint_ids

    def begin(self, endpoint_id) -> None:
        self.begun.append(endpoint_id)

    def drop(self, endpoint_id) -> None:
        self.dropped.append(endpoint_id)


class TestStore:
    """The store, away while a test says so; its leases end when a test ends them, however slow the machine is."""

    __test__ = False

    def __init__(self, store) -> None:
        self._store = store
        self.is_away = False

    def __getattr__(self, name):
        if self.is_away:
            raise ConnectionLost("away")
        return getattr(self._store, name)

    async def enrol(self, replica, _lease_s):
        await self.__getattr__("enrol")(replica, 1e6)

    async def attend(self, replica_id, _lease_s):
        return await self.__getattr__("attend")(replica_id, 1e6)


class World:
    def __init__(self, folder, endpoints: int = 2) -> None:
        self.store = open_sqlite(folder / "control.sqlite3")
        self.catalog = Catalog(
            Endpoint(id=number + 1, endpoint_name=f"e{number}", created_at=0.0) for number in range(endpoints)
        )
        self._seeds = iter(range(100))

    def replica(self, name: str, *, fleet: str = "", store=None):
        memory, clock = Memory(), FakeClock()
        replicas = Replicas(
            store=store or TestStore(self.store),
            catalog=self.catalog,
            url=f"http://{name}",
            fleet=fleet,
            territory=memory,
            records_changed=lambda _version: None,
            clock=clock,
            ids=SeededIds(next(self._seeds)),
        )
        return replicas, memory, clock


@pytest.fixture
async def world(tmp_path):
    world = World(tmp_path)
    yield world
    await world.store.close()


async def balanced(*replicas: Replicas) -> None:
    for _ in range(4):
        for one in replicas:
            await one.step()


async def test_a_second_control_plane_is_given_its_share_and_a_leaver_gives_all(world):
    a, memory, _ = world.replica("a")
    await a.enrol()
    await a.step()
    assert (a.owned(), memory.loaded, memory.begun) == ([1, 2], [1, 2], [1, 2])
    b, theirs, _ = world.replica("b")
    await b.enrol()
    await balanced(a, b)
    assert (a.owned(), b.owned(), memory.dropped) == ([1], [2], [2])
    assert a.owner_of(2).url == "http://b"
    assert b.owner_of(2) is None
    with pytest.raises(NotOwner):
        a.fence(2)
    await a.leave()
    await b.step()
    assert sorted(b.owned()) == [1, 2]
    assert sorted(theirs.loaded) == [1, 2]


async def test_one_that_was_away_beyond_its_lease_acts_no_more_and_its_fence_writes_nothing(world):
    a, _, clock = world.replica("a")
    await a.enrol()
    await a.step()
    fence = a.fence(1)
    clock.jump(3.0)
    assert a.owned() == []
    await world.store.leave(a.id)  # its lease is over
    b, _, _ = world.replica("b")
    await b.enrol()
    await b.step()
    assert b.owned() == [1, 2]
    with pytest.raises(Fenced):
        await world.store.put(WorkerRow(id=1, endpoint_id=1, workergroup_id=0, body="{}"), fence=fence)


async def test_what_was_known_is_good_again_if_nobody_else_had_the_endpoint(world):
    away = TestStore(world.store)
    a, memory, clock = world.replica("a", store=away)
    await a.enrol()
    await a.step()
    before = a.id
    away.is_away = True
    await a.step()
    assert a.is_database_away
    assert a.why_unfit() == "", "within its lease it serves on"
    clock.jump(3.0)
    assert a.owned() == []
    assert a.why_unfit() == "the database is away"
    await world.store.leave(before)
    away.is_away = False
    await a.step()
    assert not a.is_database_away
    assert (a.owned(), memory.loaded, memory.dropped) == ([1, 2], [1, 2], [])
    assert a.id != before


async def test_a_load_balancer_is_told_who_can_serve(world):
    a, _, _ = world.replica("a")
    assert a.why_unfit() == "not yet among the control planes of its database"
    await a.enrol()
    assert a.why_unfit() == ""
    await a.leave()
    assert a.why_unfit() == "not yet among the control planes of its database"


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_control_plane_that_stops_says_so_to_whoever_still_asks(is_shared):
    feed = JobFeed()
    shared = SimpleNamespace(condition=lambda: Condition(facts={"database": "ok"})) if is_shared else None
    control = SimpleNamespace(durable=SimpleNamespace(feed=feed), sharing=shared)
    assert condition_of(control).why_unfit == ""
    feed.close()
    assert condition_of(control).why_unfit == "it is stopping"


async def test_what_was_known_is_forgotten_when_another_had_the_endpoint_meanwhile(world):
    a, memory, _ = world.replica("a")
    await a.enrol()
    await a.step()
    await world.store.leave(a.id)
    b, _, _ = world.replica("b")
    await b.enrol()
    await b.step()
    await b.leave()
    await a.step()
    assert sorted(a.owned()) == [1, 2]
    assert sorted(memory.dropped) == [1, 2]
    assert memory.loaded == [1, 2, 1, 2]


async def test_a_waiter_hears_of_a_new_owner_and_an_attempt_at_the_old_one_ends(world):
    a, _, _ = world.replica("a")
    await a.enrol()
    await a.step()
    b, _, _ = world.replica("b")
    await b.enrol()
    await b.step()
    heard = []

    async def attempt() -> None:
        with anyio.CancelScope() as scope:
            forget = b.watch(1, scope)
            await anyio.sleep_forever()
        forget()
        heard.append("cut")

    async def wait() -> None:
        await b.changed(60)
        heard.append("changed")

    async with anyio.create_task_group() as waiting:
        waiting.start_soon(attempt)
        waiting.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await a.leave()
        await b.step()
    assert sorted(heard) == ["changed", "cut"]


async def test_replicas_whose_local_fleets_are_apart_refuse_each_other(world):
    a, _, _ = world.replica("a", fleet="local host /data")
    await a.enrol()
    b, _, _ = world.replica("b", fleet="local other /data")
    with pytest.raises(FleetClash, match="http://a"):
        await b.enrol()
    same, _, _ = world.replica("c", fleet="local host /data")
    await same.enrol()
    assert len(same.roll.replicas) == 2


async def test_records_made_at_one_are_known_at_the_other_after_a_look(world):
    store, clock, master = world.store, SystemClock(), b"m" * 32
    catalog = Catalog()
    keyring = Keyring(admin_key="cfa_a", master=master, catalog=catalog, clock=clock)
    account = Account(store=store, vault=Vault(master), clock=clock)
    mirror = RecordMirror(store=store, catalog=catalog, keyring=keyring, account=account, clock=clock)
    await mirror.refresh()
    await store.put(Endpoint(id=9, endpoint_name="new", created_at=0.0))
    await store.put(ApiKey(id="1", name="k", digest=digest("cfk_x"), scopes=("read",)))
    await store.put(AccountVariable(name="V", sealed=Vault(master).seal("value", "variable V"), is_secret=False))
    with pytest.raises(Unauthorized):
        keyring.principal("cfk_x")
    assert await mirror.refresh()
    assert catalog.endpoint_named("new").id == 9
    assert keyring.principal("cfk_x").scopes == {"read"}
    assert account.environment() == {"V": "value"}
    assert not await mirror.refresh()
    seen = mirror.version
    await store.put(Endpoint(id=10, endpoint_name="newer", created_at=0.0))
    await mirror.refresh()  # another caller's, between this one's look and its doubt
    assert await mirror.refresh(seen)
    await store.drop(ApiKey, "1")
    await mirror.refresh()
    with pytest.raises(Unauthorized):
        keyring.principal("cfk_x")


async def test_the_first_replicas_keys_are_everybodys_and_another_master_key_opens_none(world, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "stranger"]
    for folder in folders:
        folder.mkdir()
        for name in SHARED:
            (folder / name).write_bytes(f"{folder.name} {name}".encode())
    one, two, stranger = folders
    await share_secrets(world.store, Vault(b"master"), one)
    await share_secrets(world.store, Vault(b"master"), two)
    assert {name: (two / name).read_bytes() for name in SHARED} == {name: f"one {name}".encode() for name in SHARED}
    assert {(two / name).stat().st_mode & 0o777 for name in SHARED} == {0o600}
    with pytest.raises(OtherMasterKey, match=r"master\.key"):
        await share_secrets(world.store, Vault(b"another"), stranger)
    assert (stranger / "admin.key").read_bytes() == b"stranger admin.key"
    stored = await world.store.secret("admin.key")
    assert "one admin.key" not in stored

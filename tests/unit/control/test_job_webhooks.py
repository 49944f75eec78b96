"""Webhooks of durable jobs, over a real store and real outboxes: told at least once, always under one id."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest

from comfyfleet.control.admission import SEALED, JobSecrets
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.job_feed import Kick
from comfyfleet.control.job_webhooks import JobWebhooks
from comfyfleet.control.keys import Vault
from comfyfleet.control.ownership import Fence, NotOwner
from comfyfleet.control.records import Endpoint
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.fetcher import GuardedFetcher, Posted
from comfyfleet.ids import SeededIds
from comfyfleet.sealing import Sealer
from comfyfleet.settings.outreach import WebhookSettings
from comfyfleet.webhooks.deliver import Webhooks
from comfyfleet.webhooks.outbox import Outbox
from comfyfleet.wire.generation import WebhookTarget
from comfyfleet.wire.jobs import JobStatus
from support.stored_jobs import NOW, a_job, a_lease

pytestmark = pytest.mark.anyio
VAULT = Vault(b"m" * 64)
HOOK = WebhookTarget(url="http://127.0.0.1:9/hook", secret="s")


class Owner:
    """One of several control planes; it owns endpoint 1 while it has a fence."""

    is_shared = True

    def __init__(self) -> None:
        self.number: int | None = None

    def owns(self, _endpoint_id: int) -> bool:
        return self.number is not None

    def fence(self, endpoint_id: int) -> Fence:
        if self.number is None:
            raise NotOwner(endpoint_id)
        return Fence(endpoint_id=endpoint_id, number=self.number)


class Plane:
    """A control plane's webhooks: its own outbox, posts that a test answers. `posted`: ids, in order."""

    def __init__(self, folder, name: str, store, clock, fetcher) -> None:
        self.owner, self.posted, self.status, self.store = Owner(), [], 200, store
        self.outbox = Outbox(folder / f"{name}.sqlite3", Sealer(b"k" * 32, "webhooks"))
        fetcher.post = self._post
        kick = Kick()
        webhooks = Webhooks(self.outbox, fetcher, clock, SeededIds(1), ended=lambda event: self.hooks.told(event.job))
        self.webhooks = webhooks
        self.hooks = JobWebhooks(
            store=store,
            vault=VAULT,
            webhooks=webhooks,
            catalog=Catalog([Endpoint(id=1, endpoint_name="e", created_at=NOW)]),
            operator=WebhookSettings.from_environment({}),
            clock=clock,
            kick=kick,
            ownership=self.owner,
        )

    async def _post(self, _url, _body, *, headers, timeout_s):
        self.posted.append(headers["webhook-id"])
        return Posted(status=self.status, excerpt="", retry_after_s=None)

    async def owns_it(self) -> None:
        (taken,) = await self.store.take("r", [(1, self.owner.number or 0)]) or [None]
        self.owner.number = taken.number if taken is not None else 1
        self.hooks.begin(1)

    async def deliver(self) -> None:
        """One look at the outbox, and its posts."""
        async with anyio.create_task_group() as posts:
            await self.webhooks._start_due(posts, NOW + 10_000)


@asynccontextmanager
async def two_planes(tmp_path, clock, result: str = '{"id": "j1", "status": "completed", "message": ""}'):
    store = open_sqlite(tmp_path / "control.sqlite3")
    rules = AddressRules.parse(("127.0.0.1",))
    async with GuardedFetcher(rules, clock) as one, GuardedFetcher(rules, clock) as two:
        planes = Plane(tmp_path, "one", store, clock, one), Plane(tmp_path, "two", store, clock, two)
        sealed = VAULT.seal(msgspec.json.encode(JobSecrets(webhook=HOOK)).decode(), SEALED)
        await store.add_jobs([a_job(webhook="sealed", sealed=sealed)])
        await store.lease(a_lease())
        await store.finish("j1", token="t1", status=JobStatus.COMPLETED, result=result, error=None, now=NOW)
        await planes[0].owns_it()
        yield store, *planes
        for plane in planes:
            plane.outbox.close()
    await store.close()


async def test_what_the_receiver_has_is_over_and_its_secret_forgotten(tmp_path, clock):
    async with two_planes(tmp_path, clock) as (store, plane, _):
        await plane.hooks.step()
        assert (await store.job("j1")).sealed, "until it is told, the job itself has all that is needed to tell it"
        await plane.deliver()
        await plane.hooks.step()

        assert not await store.has_untold(1)
        assert (await store.job("j1")).sealed == ""
    assert len(plane.posted) == 1


@pytest.mark.parametrize("moment", ["before its outbox has it", "with its outbox", "after a first attempt"])
async def test_an_owner_that_never_comes_back_takes_no_webhook_with_it(tmp_path, clock, moment):
    async with two_planes(tmp_path, clock) as (store, gone, heir):
        gone.status = 503
        if moment != "before its outbox has it":
            await gone.hooks.step()
        if moment == "after a first attempt":
            await gone.deliver()
            await gone.hooks.step()
        gone.owner.number = None

        await heir.owns_it()
        await heir.hooks.step()
        await heir.deliver()
        await heir.hooks.step()

        assert not await store.has_untold(1)
    assert len(heir.posted) == 1
    assert set(gone.posted) <= set(heir.posted), "the receiver can tell that it is one event"


async def test_an_outbox_that_told_it_before_a_crash_tells_it_once(tmp_path, clock):
    async with two_planes(tmp_path, clock) as (store, plane, _):
        await plane.hooks.step()
        await plane.deliver()
        plane.hooks._told.clear()  # killed before the store knew

        plane.hooks.begin(1)
        await plane.hooks.step()
        await plane.deliver()

        assert not await store.has_untold(1)
    assert len(plane.posted) == 1


async def test_a_result_in_a_shape_of_its_own_is_told_and_holds_up_nobody(tmp_path, clock):
    async with two_planes(tmp_path, clock, result='{"status": "completed", "response": 4}') as (_, plane, _other):
        await plane.hooks.step()
        await plane.deliver()

        (event,) = plane.outbox.events(scope=None)
        assert msgspec.json.decode(event.body)["status"] == "completed"
    assert plane.posted == [event.id]


async def test_a_replica_that_owns_nothing_hands_nothing_over(tmp_path, clock):
    async with two_planes(tmp_path, clock) as (store, _, other):
        other.hooks.begin(1)
        await other.hooks.step()

        assert await store.undelivered() == ["j1"]
        assert other.outbox.events(scope=None) == []

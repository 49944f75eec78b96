"""The durable half of the control plane, put together: admission, dispatcher, leases, webhooks, ledger, janitor.

A composition root like `plane` (routing), on whose desk and registry it stands.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import anyio
import anyio.abc

from comfyfleet.clock import Clock
from comfyfleet.control.admission import Admission
from comfyfleet.control.backlog import Backlog
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.dispatcher import Dispatcher
from comfyfleet.control.held_leases import HeldLeases
from comfyfleet.control.janitor import Janitor
from comfyfleet.control.job_feed import JobFeed, Kick
from comfyfleet.control.job_run import RunOutcome
from comfyfleet.control.job_webhooks import JobWebhooks
from comfyfleet.control.jobs import Job
from comfyfleet.control.keys import Vault
from comfyfleet.control.leases import LEASE_S
from comfyfleet.control.ledger import Ledger
from comfyfleet.control.metrics import Metrics
from comfyfleet.control.ownership import Ownership
from comfyfleet.control.plane import RoutingPlane
from comfyfleet.control.promises import Promises
from comfyfleet.control.shared_folder import own_file
from comfyfleet.control.shared_use import SharedUse
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.news import News
from comfyfleet.control.worker_calls import WorkerCalls
from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.ids import Ids
from comfyfleet.sealing import Sealer
from comfyfleet.settings.control import ControlSettings
from comfyfleet.settings.outreach import FetchSettings, WebhookSettings
from comfyfleet.settings.storage import S3Settings
from comfyfleet.webhooks.deliver import Webhooks
from comfyfleet.webhooks.outbox import Outbox


class DurablePlane:
    """Everything between an accepted job and its end being known."""

    def __init__(
        self,
        *,
        settings: ControlSettings,
        store: Store,
        catalog: Catalog,
        vault: Vault,
        webhook_key: bytes,
        routing: RoutingPlane,
        metrics: Metrics,
        session: aiohttp.ClientSession,
        fetcher: GuardedFetcher,
        trusted: GuardedFetcher,
        s3_of: Callable[[int], S3Settings | None],
        clock: Clock,
        ids: Ids,
        ownership: Ownership,
    ) -> None:
        operator = WebhookSettings.from_environment(settings.inherited)
        self.feed = JobFeed()
        self.backlog = Backlog()
        self.limits = routing.limits
        promises = Promises(self.backlog, routing.workers)
        self.limits.promised = promises.of_scope
        self.ownership = ownership
        self._store = store
        self._catalog = catalog
        self._metrics = metrics
        self._clock = clock
        self._ended = Kick()
        outbox, self._outbox_lock = own_file(settings.data_dir, "webhooks", ".sqlite3")
        self._outbox = Outbox(outbox, Sealer(webhook_key, "webhooks"))
        self._webhooks = Webhooks(
            self._outbox, fetcher, clock, ids, trusted=trusted, ended=lambda event: self._job_webhooks.told(event.job)
        )
        self.admission = Admission(
            store=store,
            catalog=catalog,
            learned=routing.learned,
            limits=self.limits,
            promises=promises,
            vault=vault,
            fetcher=fetcher,
            anywhere=trusted,
            operator=operator,
            s3_of=s3_of,
            clock=clock,
            ids=ids,
        )
        self.ledger = Ledger(
            store=store,
            workers=routing.workers,
            limits=self.limits,
            clock=clock,
            price_gpu_hour=settings.price_gpu_hour,
            price_storage_hour=settings.price_storage_hour,
        )
        routing.reports.used = self.ledger.request_ended
        room = Kick()
        leases = HeldLeases(
            store=store,
            catalog=catalog,
            desk=routing.desk,
            workers=routing.workers,
            tickets=routing.tickets,
            calls=WorkerCalls(session),
            feed=self.feed,
            backlog=self.backlog,
            vault=vault,
            clock=clock,
            ids=ids,
            ended=self._run_ended,
            kick=room,
            lost_after_s=settings.lost_after_s,
            ownership=self.ownership,
        )
        self.dispatcher = Dispatcher(
            store=store,
            catalog=catalog,
            desk=routing.desk,
            backlog=self.backlog,
            leases=leases,
            clock=clock,
            kick=room,
            ownership=self.ownership,
        )
        self._janitor = Janitor(
            store=store,
            catalog=catalog,
            workers=routing.workers,
            feed=self.feed,
            backlog=self.backlog,
            clock=clock,
            ended=self._ended,
            keep_s=settings.retention_days * 86_400.0,
            ownership=self.ownership,
        )
        self._shared_use = SharedUse(store=store, limits=self.limits, clock=clock)
        self._job_webhooks = JobWebhooks(
            store=store,
            vault=vault,
            webhooks=self._webhooks,
            catalog=catalog,
            operator=operator,
            clock=clock,
            kick=self._ended,
            ownership=self.ownership,
        )

    async def load(self) -> None:
        """Before anybody is served: what is used, waits and runs already, or every limit would stand open at first."""
        await self.ledger.load()
        self.backlog.begin_sync()
        self.backlog.replace(await self._store.waiting())
        self.backlog.replace_running(await self._store.leased())

    async def run(self) -> None:
        """The loops, until cancelled."""
        try:
            async with anyio.create_task_group() as loops:
                loops.start_soon(self.dispatcher.run, name="dispatcher")
                loops.start_soon(self._janitor.run, name="janitor")
                loops.start_soon(self._job_webhooks.run, name="job webhooks")
                loops.start_soon(self._webhooks.run, name="webhooks")
                loops.start_soon(self.ledger.run, name="ledger")
                if self.ownership.is_shared:
                    loops.start_soon(self._shared_use.run, name="use of keys")
                loops.start_soon(self._store.listen, self._heard, name="news of other processes")
        finally:
            with anyio.CancelScope(shield=True):  # seconds that were used must be on the ledger
                self.ledger.count()
                await self.ledger.flush()
                self._outbox.close()
                os.close(self._outbox_lock)

    def begin(self, endpoint_id: int) -> None:
        """The endpoint is this replica's from now on."""
        self.dispatcher.begin(endpoint_id)
        self._job_webhooks.begin(endpoint_id)

    def drop(self, endpoint_id: int) -> None:
        """The endpoint is another replica's."""
        self.dispatcher.drop(endpoint_id)

    def now(self) -> float:
        """This plane's wall time."""
        return self._clock.now()

    def cancelled(self, job: Job, *, has_waited: bool) -> None:
        """A caller cancelled a job: its run, its followers, its webhook and the autoscaler want to know."""
        if has_waited:
            self.backlog.remove(job.endpoint_id, job.scope, job.cost)
        self.feed.cancel(job.id)
        self.feed.news(job.id)
        self._ended()

    def _heard(self, news: News) -> None:
        """Another process changed something in the store: whoever waits for it here looks now."""
        if news.is_all:
            self.feed.all_news()
        for job_id in (*news.jobs, *news.cancels):
            self.feed.news(job_id)
        for job_id in news.cancels:
            self.feed.cancel(job_id)
        if news.cancels:
            self._ended()
        if news.is_all or any(self.ownership.owns(endpoint_id) for endpoint_id in news.endpoints):
            self.dispatcher.look_again()

    def _run_ended(self, outcome: RunOutcome) -> None:
        endpoint = self._catalog.endpoint(outcome.job.endpoint_id)
        name = endpoint.endpoint_name if endpoint is not None else str(outcome.job.endpoint_id)
        self.ledger.job_ended(outcome)
        if outcome.job.attempts == 1 and outcome.status is not None:
            leased_at = (outcome.job.lease_expires or 0.0) - LEASE_S
            self._metrics.job_wait_s.labels(name).observe(max(0.0, leased_at - outcome.job.created_at))
        if outcome.status is None:
            self._metrics.leases_lost.labels(name).inc()
        else:
            self._metrics.jobs_finished.labels(name, str(outcome.status)).inc()
        self._ended()


@asynccontextmanager
async def outreach(
    settings: ControlSettings, clock: Clock
) -> AsyncIterator[tuple[aiohttp.ClientSession, GuardedFetcher, GuardedFetcher]]:
    """The HTTP clients: one to our workers, one to whatever a caller names, one to what the operator named."""
    fetch = FetchSettings.from_environment(settings.inherited)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0), cookie_jar=aiohttp.DummyCookieJar()
            )
        )
        rules = AddressRules.parse(fetch.allowed_private_hosts)
        fetcher = await stack.enter_async_context(GuardedFetcher(rules, clock))
        trusted = await stack.enter_async_context(GuardedFetcher(AddressRules.anywhere(), clock))
        yield session, fetcher, trusted

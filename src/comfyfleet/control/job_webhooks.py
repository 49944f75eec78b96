"""Webhooks of durable jobs: what is due goes into this control plane's outbox, and is over when the outbox says so.

The job's row is the promise, this outbox only carries it out. The row says `due` in the transaction that ends the job,
`out` while an outbox tells it, `sent` when the receiver has it or was given up. Whoever becomes the endpoint's owner
makes what was out due again: the outbox may be gone with its control plane. An event's id is made of its content, so a
crash at any point tells the receiver at least once, and always under the same id.
"""

from __future__ import annotations

import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.admission import SEALED, JobSecrets
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.job_feed import Kick
from comfyfleet.control.jobs import Job
from comfyfleet.control.keys import Vault
from comfyfleet.control.ownership import NotOwner, Ownership
from comfyfleet.control.store.base import Store
from comfyfleet.control.store.ownership_table import Fenced
from comfyfleet.sealing import CannotOpen
from comfyfleet.settings.outreach import WebhookSettings
from comfyfleet.webhooks import envelope
from comfyfleet.webhooks.deliver import Webhooks
from comfyfleet.webhooks.receivers import receiver_of
from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.generation import GenerateResult

log = structlog.get_logger()

RETRY_EVERY_S = 15.0


class JobWebhooks:
    """The loop between the job table and the outbox."""

    def __init__(
        self,
        *,
        store: Store,
        vault: Vault,
        webhooks: Webhooks,
        catalog: Catalog,
        operator: WebhookSettings,
        clock: Clock,
        kick: Kick,
        ownership: Ownership,
    ) -> None:
        self._store = store
        self._vault = vault
        self._webhooks = webhooks
        self._catalog = catalog
        self._operator = operator
        self._clock = clock
        self._kick = kick
        self._ownership = ownership
        self._begun: set[int] = set()  # endpoints that are newly ours: what was out there may be lost
        self._told: set[str] = set()  # jobs whose webhook is over, which the store does not know yet

    def begin(self, endpoint_id: int) -> None:
        """The endpoint is ours from now on."""
        self._begun.add(endpoint_id)
        self._kick()

    def told(self, job_id: str) -> None:
        """The job's receiver has it, or is given up."""
        self._told.add(job_id)
        self._kick()

    async def run(self) -> None:
        if not self._ownership.is_shared:
            self._begun |= {endpoint.id for endpoint in self._catalog.endpoints()}
        while True:
            try:
                await self.step()
            except (Fenced, NotOwner) as error:  # another's by now, who takes it up from the store
                log.info("job_webhooks.fenced", why=str(error))
            except Exception:  # one iteration: what is due stays due
                log.exception("job_webhooks.failed")
            await self._kick.wait(RETRY_EVERY_S)

    async def step(self) -> None:
        """One pass over what is over, what may be lost and what is due."""
        for job_id in list(self._told):
            await self._store.webhook_ended(job_id)
            self._told.discard(job_id)
        for endpoint_id in list(self._begun):
            if self._ownership.owns(endpoint_id):
                await self._store.webhooks_due_again(endpoint_id, fence=self._ownership.fence(endpoint_id))
            self._begun.discard(endpoint_id)
        for job_id in await self._store.undelivered():
            job = await self._store.job(job_id)
            if job is not None and self._ownership.owns(job.endpoint_id):
                await self._hand_over(job)

    async def _hand_over(self, job: Job) -> None:
        fence = self._ownership.fence(job.endpoint_id)
        try:
            target = msgspec.json.decode(self._vault.open(job.sealed, SEALED), type=JobSecrets).webhook
            body = envelope.result_body(final_result(job), target.extra_params)
            receiver = receiver_of(target, self._operator)
            if receiver is None:
                return await self._store.webhook_ended(job.id)
            event = await self._webhooks.send(receiver, body, scope=job.scope, job=job.id, event=f"job.{job.status}")
        except (FleetError, CannotOpen) as error:
            log.warning("job.webhook_refused", job=job.id, why=str(error))
            return await self._store.webhook_ended(job.id)
        if await self._webhooks.has_ended(event):  # told before, by this outbox, and not noted
            return await self._store.webhook_ended(job.id)
        return await self._store.webhook_out(job.id, fence=fence)


def final_result(job: Job) -> GenerateResult:
    """The worker's result, or the same shape for a job that no worker finished."""
    if job.result is not None:
        try:
            return msgspec.json.decode(job.result, type=GenerateResult)
        except msgspec.ValidationError:  # a public PyWorker's model answers in any shape; the job has it whole
            return GenerateResult(id=job.id, message="", status=str(job.status))
    error = msgspec.json.decode(job.error) if job.error else {}
    return GenerateResult(id=job.id, message=str(error.get("message", "")), status=str(job.status), error=error)

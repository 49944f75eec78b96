"""Webhooks of durable jobs: a final job's is handed to the outbox once it is final, and marked so.

The job row says `due` in the transaction that ends the job, and the outbox knows an event by its content, so that a
crash at any point tells the receiver once and never not at all.
"""

from __future__ import annotations

import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.control.admission import SEALED, JobSecrets
from comfyfleet.control.job_feed import Kick
from comfyfleet.control.jobs import Job
from comfyfleet.control.keys import Vault
from comfyfleet.control.ownership import Ownership
from comfyfleet.control.store.base import Store
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
        operator: WebhookSettings,
        clock: Clock,
        kick: Kick,
        ownership: Ownership,
    ) -> None:
        self._store = store
        self._vault = vault
        self._webhooks = webhooks
        self._operator = operator
        self._clock = clock
        self._kick = kick
        self._ownership = ownership

    async def run(self) -> None:
        while True:
            try:
                for job_id in await self._store.undelivered():
                    job = await self._store.job(job_id)
                    if job is not None and self._ownership.owns(job.endpoint_id):
                        await self._hand_over(job)
            except Exception:  # one iteration: what is due stays due
                log.exception("job_webhooks.failed")
            await self._kick.wait(RETRY_EVERY_S)

    async def _hand_over(self, job: Job) -> None:
        try:
            target = msgspec.json.decode(self._vault.open(job.sealed, SEALED), type=JobSecrets).webhook
            body = envelope.result_body(final_result(job), target.extra_params)
            receiver = receiver_of(target, self._operator)
            if receiver is not None:
                await self._webhooks.send(receiver, body, scope=job.scope, job=job.id, event=f"job.{job.status}")
        except (FleetError, CannotOpen) as error:
            log.warning("job.webhook_refused", job=job.id, why=str(error))
        await self._store.mark_delivered(job.id)


def final_result(job: Job) -> GenerateResult:
    """The worker's result, or the same shape for a job that no worker finished."""
    if job.result is not None:
        return msgspec.json.decode(job.result, type=GenerateResult)
    error = msgspec.json.decode(job.error) if job.error else {}
    return GenerateResult(id=job.id, message=str(error.get("message", "")), status=str(job.status), error=error)

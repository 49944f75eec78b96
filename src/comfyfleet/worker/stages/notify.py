"""Tell the request's webhook, else the operator's, what became of a job. Promises durably; delivery happens elsewhere.

The end of a job is always told; `webhook.events` may ask for `started` and `progress` besides. Progress is told at
most once in `PROGRESS_EVERY_S`, since a sampler step is no news to a server far away.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from comfyfleet.clock import Clock
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.settings.outreach import WebhookSettings
from comfyfleet.webhooks import envelope
from comfyfleet.webhooks.deliver import Webhooks
from comfyfleet.webhooks.outbox import Delivery
from comfyfleet.webhooks.receivers import check_receiver, receiver_of
from comfyfleet.wire.errors import BadRequest
from comfyfleet.wire.generation import GenerateResult, WebhookTarget
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.job import RunEvent

PROGRESS_EVERY_S = 2.0


class Notify:
    """The stage; one for the whole process."""

    def __init__(self, webhooks: Webhooks, fetcher: GuardedFetcher, operator: WebhookSettings, clock: Clock) -> None:
        self.webhooks = webhooks
        self._fetcher = fetcher
        self._operator = operator
        self._clock = clock

    def check(self, target: WebhookTarget) -> None:
        """Refuse a webhook that can never be told, before the job is accepted. Raises InputRefused or BadRequest."""
        check_receiver(target, self._operator, self._fetcher, field="input.webhook")

    async def finished(
        self, result: GenerateResult, target: WebhookTarget, *, scope: str, occurrence: str = ""
    ) -> str | None:
        """The job ended, well or not. Returns the event's id; calling again for the same end changes nothing.

        `occurrence` tells apart two jobs that had one id at different times (say, when each was accepted).
        """
        receiver = receiver_of(target, self._operator)
        if receiver is None:
            return None
        body = envelope.result_body(result, target.extra_params)
        return await self.webhooks.send(
            receiver, body, scope=scope, job=result.id, event=f"job.{result.status}", occurrence=occurrence
        )

    async def follow(self, events: AsyncIterator[RunEvent], job_id: str, target: WebhookTarget, *, scope: str) -> None:
        """Tell a job's own log as far as the webhook asked for it: its beginning, and now and then its progress."""
        receiver = receiver_of(target, self._operator)
        if receiver is None or not {"started", "progress"} & set(target.events):
            return
        told_at, has_begun = 0.0, False
        async for event in events:
            if event.status is not RunStatus.GENERATING:
                continue
            kind = "progress" if has_begun else "started"
            has_begun = True
            now = self._clock.now()
            if kind not in target.events or (kind == "progress" and now - told_at < PROGRESS_EVERY_S):
                continue
            told_at = now
            body = envelope.progress_body(
                job_id, event.status.value, event.message, _progress(event), target.extra_params
            )
            await self.webhooks.send(
                receiver,
                body,
                scope=scope,
                job=job_id,
                event=f"job.{kind}",
                occurrence=f"{event.at:.3f}/{event.number}",
            )

    async def test(self, target: WebhookTarget) -> Delivery:
        """Post a sample to the receiver that a job with this target would have. Raises BadRequest without one."""
        receiver = receiver_of(target, self._operator)
        if receiver is None:
            raise BadRequest("no webhook is set", field="webhook.url")
        sample = GenerateResult(id="test", message="This is a test.", status="completed")
        return await self.webhooks.test(receiver, envelope.result_body(sample, target.extra_params))


def _progress(event: RunEvent) -> dict[str, float | int | str | None]:
    """As in the stream's frames."""
    return {"percentage": event.progress, "node": event.node, "value": event.step, "max": event.steps}

"""Tell the request's webhook, else the operator's, what became of a job. Promises durably; delivery happens elsewhere.

The end of a job is always told; `webhook.events` may ask for `started` and `progress` besides. Progress is told at
most once in `PROGRESS_EVERY_S`, since a sampler step is no news to a server far away.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfyfleet.clock import Clock
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.settings.outreach import WebhookSettings
from comfyfleet.webhooks import envelope
from comfyfleet.webhooks.deliver import Webhooks
from comfyfleet.webhooks.outbox import Delivery, Receiver
from comfyfleet.wire.errors import BadRequest
from comfyfleet.wire.generation import GenerateResult, WebhookTarget

PROGRESS_EVERY_S = 2.0
EVENTS = frozenset({"started", "progress", "completed", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class ProgressNews:
    """How far a job is: `value` of `max` weighted over nodes and steps, and a word about it."""

    percentage: float
    node_id: str = ""
    message: str = ""


def receiver_of(target: WebhookTarget, operator: WebhookSettings) -> Receiver | None:
    """The request's receiver over the operator's; the operator's secret signs where the request brings none."""
    url = target.url or operator.url
    if not url:
        return None
    secrets = tuple(target.secret.replace(",", " ").split()) or operator.secrets
    timeout_s = target.timeout if target.url and target.timeout > 0 else operator.timeout_s
    return Receiver(url=url, secrets=secrets, timeout_s=timeout_s, trusted=url == operator.url)


class Notify:
    """The stage; one for the whole process."""

    def __init__(self, webhooks: Webhooks, fetcher: GuardedFetcher, operator: WebhookSettings, clock: Clock) -> None:
        self.webhooks = webhooks
        self._fetcher = fetcher
        self._operator = operator
        self._clock = clock
        self._last_progress: dict[tuple[str, str], float] = {}

    def check(self, target: WebhookTarget) -> None:
        """Refuse a webhook that can never be told, before the job is accepted. Raises InputRefused or BadRequest."""
        if target.url:
            self._fetcher.check_url(target.url)
        unknown = sorted(set(target.events) - EVENTS)
        if unknown:
            raise BadRequest(f"webhook.events knows no {unknown[0]!r}", field="input.webhook.events")

    async def finished(
        self, result: GenerateResult, target: WebhookTarget, *, scope: str, occurrence: str = ""
    ) -> str | None:
        """The job ended, well or not. Returns the event's id; calling again for the same end changes nothing.

        `occurrence` tells apart two jobs that had one id at different times (say, when each was accepted).
        """
        self._last_progress.pop((scope, result.id), None)
        receiver = receiver_of(target, self._operator)
        if receiver is None:
            return None
        body = envelope.result_body(result, target.extra_params)
        return await self.webhooks.send(
            receiver, body, scope=scope, job=result.id, event=f"job.{result.status}", occurrence=occurrence
        )

    async def started(self, job_id: str, target: WebhookTarget, *, scope: str) -> str | None:
        """The engine began; told only when asked for."""
        receiver = receiver_of(target, self._operator)
        if receiver is None or "started" not in target.events:
            return None
        body = envelope.progress_body(job_id, "processing", "Started.", {"percentage": 0.0}, target.extra_params)
        return await self.webhooks.send(receiver, body, scope=scope, job=job_id, event="job.started")

    async def progressed(
        self, job_id: str, status: str, news: ProgressNews, target: WebhookTarget, *, scope: str
    ) -> str | None:
        """The job went on; told only when asked for, and not more often than every `PROGRESS_EVERY_S`."""
        receiver = receiver_of(target, self._operator)
        now = self._clock.now()
        if receiver is None or "progress" not in target.events:
            return None
        if now - self._last_progress.get((scope, job_id), 0.0) < PROGRESS_EVERY_S:
            return None
        self._last_progress[scope, job_id] = now
        body = envelope.progress_body(job_id, status, news.message, news, target.extra_params)
        return await self.webhooks.send(
            receiver, body, scope=scope, job=job_id, event="job.progress", occurrence=f"{now:.3f}"
        )

    async def test(self, target: WebhookTarget) -> Delivery:
        """Post a sample to the receiver that a job with this target would have. Raises BadRequest without one."""
        receiver = receiver_of(target, self._operator)
        if receiver is None:
            raise BadRequest("no webhook is set", field="webhook.url")
        sample = GenerateResult(id="test", message="This is a test.", status="completed")
        return await self.webhooks.test(receiver, envelope.result_body(sample, target.extra_params))

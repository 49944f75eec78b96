"""Who is told, and who may be: one rule for worker and control plane.

A request's receiver stands over the operator's, and the operator's secrets sign where the request brings none. Where
the operator himself sends news may be on his own network; any other receiver must be at a public address.
"""

from __future__ import annotations

from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.settings.outreach import WebhookSettings
from comfyfleet.webhooks.outbox import Receiver
from comfyfleet.wire.errors import BadRequest
from comfyfleet.wire.generation import WebhookTarget

# Of these a receiver may choose.
EVENTS = frozenset({"started", "progress", "completed", "failed", "cancelled"})


def receiver_of(target: WebhookTarget, operator: WebhookSettings) -> Receiver | None:
    """The receiver of a job with this target; None where neither the request nor the operator names one."""
    url = target.url or operator.url
    if not url:
        return None
    secrets = tuple(target.secret.replace(",", " ").split()) or operator.secrets
    timeout_s = target.timeout if target.url and target.timeout > 0 else operator.timeout_s
    return Receiver(url=url, secrets=secrets, timeout_s=timeout_s, trusted=url == operator.url)


def check_receiver(target: WebhookTarget, operator: WebhookSettings, fetcher: GuardedFetcher, *, field: str) -> None:
    """Refuse a receiver that can never be told, before anything is done. field: where the target stood.

    Raises InputRefused or BadRequest naming what in it.
    """
    if target.url and target.url != operator.url:
        fetcher.check_url(target.url, field=f"{field}.url")
    if unknown := sorted(set(target.events) - EVENTS):
        raise BadRequest(f"{field}.events knows no {unknown[0]!r}", field=f"{field}.events")

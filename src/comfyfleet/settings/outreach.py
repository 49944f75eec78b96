"""What requests may make us reach: webhooks by the wrapper's names, and the guarded fetcher's limits.

`WEBHOOK_URL, WEBHOOK_SECRET` (several, separated by spaces, while a secret is rotated; the first one is the old
header's), `WEBHOOK_TIMEOUT` (s); ours: `COMFYFLEET_ALLOWED_PRIVATE_HOSTS` (host names, addresses or networks,
separated by commas, that need not be public), `COMFYFLEET_INPUT_MAX_BYTES`, `COMFYFLEET_INPUT_TIMEOUT_S`,
`COMFYFLEET_INPUT_CACHE_BYTES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from comfyfleet.settings.storage import number


@dataclass(frozen=True, kw_only=True)
class WebhookSettings:
    """The default receiver, used when a request names none."""

    url: str = field(default="", repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    timeout_s: float = 30.0

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> WebhookSettings:
        """Raises ValueError naming the variable that is no number."""
        return cls(
            url=env.get("WEBHOOK_URL", "").strip(),
            secrets=tuple(env.get("WEBHOOK_SECRET", "").replace(",", " ").split()),
            timeout_s=number(env, "WEBHOOK_TIMEOUT", 30.0) or 30.0,
        )


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """Bounds on what a request may name."""

    allowed_private_hosts: tuple[str, ...] = ()
    input_max_bytes: int = 4 * 1024**3
    input_timeout_s: float = 1800.0
    input_cache_bytes: int = 20 * 1024**3

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> FetchSettings:
        """Raises ValueError naming the variable that is no number."""
        hosts = env.get("COMFYFLEET_ALLOWED_PRIVATE_HOSTS", "")
        return cls(
            allowed_private_hosts=tuple(host.strip() for host in hosts.split(",") if host.strip()),
            input_max_bytes=int(number(env, "COMFYFLEET_INPUT_MAX_BYTES", cls.input_max_bytes)),
            input_timeout_s=number(env, "COMFYFLEET_INPUT_TIMEOUT_S", cls.input_timeout_s),
            input_cache_bytes=int(number(env, "COMFYFLEET_INPUT_CACHE_BYTES", cls.input_cache_bytes)),
        )

"""Who calls, and what that caller may do. Decides from values; reading keys is `control.keys`.

A principal's `scope` names the caller in tickets and job records: results of one scope are invisible to another.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfyfleet.control.records import KeyLimits
from comfyfleet.wire.errors import Forbidden, NotFound

ADMIN = "admin"  # everything, keys included
MANAGE = "manage"  # endpoints, workergroups, templates, variables
READ = "read"  # listings, workers, logs, metrics
ROUTE = "route"  # /route/
JOBS = "jobs"  # /v1/jobs
SCOPES = (ADMIN, MANAGE, READ, ROUTE, JOBS)
NO_LIMITS = KeyLimits()


@dataclass(frozen=True, kw_only=True)
class Principal:
    """A caller known by its key. endpoint_ids: the endpoints it may touch, empty for all."""

    scope: str
    scopes: frozenset[str]
    endpoint_ids: frozenset[int] = frozenset()
    limits: KeyLimits = NO_LIMITS
    user_id: int = 1

    def may(self, right: str, endpoint_id: int | None = None) -> bool:
        if ADMIN not in self.scopes and right not in self.scopes:
            return False
        return endpoint_id is None or not self.endpoint_ids or endpoint_id in self.endpoint_ids

    def demand(self, right: str, endpoint_id: int | None = None) -> None:
        """Raises Forbidden; NotFound where even the endpoint's existence is none of the caller's business."""
        if not self.may(right):
            raise Forbidden(f"this key lacks the scope {right!r}", scope=right)
        if not self.may(right, endpoint_id):
            raise NotFound("no such endpoint", endpoint_id=endpoint_id)

    def demand_account_wide(self, right: str) -> None:
        """For what belongs to no endpoint, or to all. Raises Forbidden, also for a key that is bound to some."""
        self.demand(right)
        if self.endpoint_ids:
            raise Forbidden("this key is for some endpoints only, and that is the whole account's", scope=right)

    @property
    def sees_all(self) -> bool:
        return ADMIN in self.scopes and not self.endpoint_ids

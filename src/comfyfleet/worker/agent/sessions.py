"""Sessions: a run of requests that stays on one worker. The table and its rules; no I/O.

`/session/create` consumes a ticket and binds it: later requests show the same auth_data and the session's id. Every
request prolongs the session by its lifetime. A full table is 429, so that the client looks for another worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfyfleet.ids import Ids
from comfyfleet.wire.errors import BadRequest, SessionGone, TooManyRequests, Unauthorized
from comfyfleet.wire.tickets import TicketClaims

MAX_LIFETIME_S = 24 * 3600.0


@dataclass(kw_only=True)
class Session:
    """Times are epoch seconds. running: its jobs that are not done; a session in use does not expire."""

    session_id: str
    auth_data: Mapping[str, Any]
    claims: TicketClaims
    lifetime_s: float
    created_at: float
    expires_at: float
    on_close_route: str
    on_close_payload: Mapping[str, Any]
    running: int = 0
    is_closed: bool = False

    def has_expired(self, now: float) -> bool:
        return not self.running and self.expires_at < now

    def as_dict(self) -> dict[str, Any]:
        """The answer of `/session/get`, in the known worker's words."""
        return {
            "session_id": self.session_id,
            "auth_data": dict(self.auth_data),
            "lifetime": self.lifetime_s,
            "expiration": self.expires_at,
            "created_at": self.created_at,
            "on_close_route": self.on_close_route or None,
            "on_close_payload": dict(self.on_close_payload) or None,
        }


class Sessions:
    """The open sessions of one worker, at most `limit` (0: no limit)."""

    def __init__(self, *, limit: int, ids: Ids) -> None:
        self._limit = limit
        self._ids = ids
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def check_room(self) -> None:
        """Raises TooManyRequests when the table is full; asked before a ticket is used up."""
        if self._limit and len(self._open) >= self._limit:
            soonest = min(session.expires_at for session in self._open.values())
            raise TooManyRequests(f"all {self._limit} session slots are taken", reason="sessions_full", free_at=soonest)

    def create(
        self,
        *,
        auth_data: Mapping[str, Any],
        claims: TicketClaims,
        lifetime_s: float,
        on_close_route: str,
        on_close_payload: Mapping[str, Any],
        now: float,
    ) -> Session:
        self.check_room()
        if not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise BadRequest(f"lifetime must be above 0 and at most {MAX_LIFETIME_S:g} s", field="payload.lifetime")
        session = Session(
            session_id=self._ids.token()[:13].replace("-", "x").replace("_", "y"),
            auth_data=auth_data,
            claims=claims,
            lifetime_s=lifetime_s,
            created_at=now,
            expires_at=now + lifetime_s,
            on_close_route=on_close_route,
            on_close_payload=on_close_payload,
        )
        self._open[session.session_id] = session
        return session

    def find(self, session_id: str, auth_data: Mapping[str, Any], now: float) -> Session | None:
        """The open session of that id, for its owner. Raises Unauthorized for anybody else."""
        session = self._open.get(session_id)
        if session is None or session.has_expired(now):
            return None
        if dict(auth_data) != dict(session.auth_data):
            raise Unauthorized("session_auth is not this session's", reason="other_session_auth")
        return session

    def use(self, session_id: str, auth_data: Mapping[str, Any], now: float) -> Session:
        """Prolong and return; raises SessionGone."""
        session = self.find(session_id, auth_data, now)
        if session is None:
            raise SessionGone("invalid session", session_id=session_id)
        session.expires_at += session.lifetime_s
        return session

    def close(self, session_id: str) -> Session | None:
        """Remove it; None when it was closed already."""
        session = self._open.pop(session_id, None)
        if session is not None:
            session.is_closed = True
        return session

    def expired(self, now: float) -> list[Session]:
        return [session for session in self._open.values() if session.has_expired(now)]

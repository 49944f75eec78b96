"""The session routes of the public port, over the table in `sessions`.

Unlike the public worker, `/session/create` needs a ticket, which it uses up, and `on_close_route` may not point at the
inside of a network: it goes through the guarded fetcher like every other address from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import structlog
from starlette.responses import Response

from comfyfleet.clock import Clock
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.web import JsonResponse
from comfyfleet.wire.errors import BadRequest, FleetError, NotFound, TooManyRequests, Unauthorized, Unprocessable
from comfyfleet.worker.agent.load_book import LoadBook
from comfyfleet.worker.agent.sessions import Session, Sessions
from comfyfleet.worker.agent.tickets import TicketChecker

log = structlog.get_logger()

SWEEP_S = 5.0
DEFAULT_LIFETIME_S = 60.0

CLOSE_CALL_LIMIT_S = 10.0


class SessionRoutes:
    """`answer` handles one call; `close_expired` is the loop that ends what was left open."""

    def __init__(self, *, table: Sessions, book: LoadBook, clock: Clock, fetcher: GuardedFetcher) -> None:
        self.table = table
        self._book = book
        self._clock = clock
        self._fetcher = fetcher

    async def answer(self, path: str, call: Mapping[str, Any], tickets: TicketChecker) -> Response:
        if path == "/session/create":
            return await self._create(call, tickets)
        session_id = call.get("session_id")
        if not isinstance(session_id, str):
            raise Unprocessable("session_id is missing", field="session_id")
        session_auth = call.get("session_auth")
        if not isinstance(session_auth, Mapping):
            raise Unprocessable("session_auth is missing", field="session_auth")
        session = self.table.find(session_id, session_auth, self._clock.now())
        if path == "/session/health":
            return JsonResponse({"ok": session is not None})
        if session is None:
            raise BadRequest("session does not exist", session_id=session_id)
        if path == "/session/get":
            return JsonResponse(session.as_dict())
        if path == "/session/end":
            await self.close(session)
            return JsonResponse({"ended": True, "removed_session": session_id})
        raise NotFound("there is no such route")

    def job_began(self, session: Session) -> None:
        """A job of the session runs; `job_ended` follows."""
        session.running += 1

    def job_ended(self, session: Session) -> None:
        """A session lives its lifetime beyond its last job; one that was closed meanwhile has done its work now."""
        now = self._clock.now()
        session.running -= 1
        session.expires_at = max(session.expires_at, now + session.lifetime_s)
        if session.is_closed and not session.running:
            self._book.end(reqnum=session.claims.reqnum, status="Success", now=now)

    async def close(self, session: Session) -> None:
        """End it, book its work, and tell whoever asked to be told. A receiver that fails changes nothing here."""
        if self.table.close(session.session_id) is None:
            return
        if not session.running:  # else its load is on the worker until the last job is done
            self._book.end(reqnum=session.claims.reqnum, status="Success", now=self._clock.now())
        if session.on_close_route:
            body = msgspec.json.encode({**session.on_close_payload, "session_id": session.session_id})
            try:
                await self._fetcher.post(
                    session.on_close_route,
                    body,
                    headers={"Content-Type": "application/json"},
                    timeout_s=CLOSE_CALL_LIMIT_S,
                )
            except FleetError as error:
                log.warning("session.close_call_failed", session_id=session.session_id, why=str(error))

    async def close_expired(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_S)
            for session in self.table.expired(self._clock.now()):
                if session.has_expired(self._clock.now()):  # it may have been used while another one was closed
                    await self.close(session)

    async def _create(self, call: Mapping[str, Any], tickets: TicketChecker) -> Response:
        auth_data, payload = call.get("auth_data"), call.get("payload") or {}
        if not isinstance(auth_data, Mapping):
            raise Unauthorized("a ticket is needed: auth_data is missing", reason="no_ticket")
        if not isinstance(payload, Mapping):
            raise Unprocessable("payload must be an object", field="payload")
        asked = tickets.verify(auth_data)
        try:
            self.table.check_room()
        except TooManyRequests:
            self._book.reject(request_idx=asked.request_idx, cost=asked.cost, now=self._clock.now())
            raise
        on_close_route = payload.get("on_close_route") or ""
        on_close_payload = payload.get("on_close_payload") or {}
        if not isinstance(on_close_route, str) or not isinstance(on_close_payload, Mapping):
            raise BadRequest("on_close_route must be text, on_close_payload an object", field="payload.on_close_route")
        if on_close_route:
            if not on_close_route.startswith(("http://", "https://")):
                raise BadRequest("on_close_route must be a whole http(s) address", field="payload.on_close_route")
            self._fetcher.check_url(on_close_route, field="payload.on_close_route")
        lifetime = payload.get("lifetime", DEFAULT_LIFETIME_S)
        if isinstance(lifetime, bool) or not isinstance(lifetime, (int, float)):
            raise BadRequest("lifetime must be a number of seconds", field="payload.lifetime")
        claims = tickets.consume(auth_data)
        now = self._clock.now()
        session = self.table.create(
            auth_data=auth_data,
            claims=claims,
            lifetime_s=float(lifetime),
            on_close_route=on_close_route,
            on_close_payload=on_close_payload,
            now=now,
        )
        # A session is load for as long as it is open; ticket 0 keeps it out of the finished requests.
        self._book.begin(reqnum=claims.reqnum, request_idx=0, cost=claims.cost, now=now)
        return JsonResponse({"session_id": session.session_id, "expiration": session.expires_at}, status_code=201)

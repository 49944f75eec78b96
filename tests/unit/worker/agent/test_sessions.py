"""A session belongs to whoever showed its ticket, and lives as long as it is used."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from comfyfleet.ids import SeededIds
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import BadRequest, SessionGone, TooManyRequests, Unauthorized
from comfyfleet.wire.tickets import TicketClaims
from comfyfleet.worker.agent.load_book import LoadBook
from comfyfleet.worker.agent.session_routes import SessionRoutes
from comfyfleet.worker.agent.sessions import Session, Sessions

CLAIMS = TicketClaims(url="u", endpoint="e", cost=100.0, reqnum=1, request_idx=1, exp=0.0, sub="k")
AUTH = {"url": "u", "reqnum": 1}


def opened(sessions: Sessions, *, now: float = 0.0, lifetime_s: float = 60.0, auth: dict[str, Any] = AUTH) -> Session:
    return sessions.create(
        auth_data=auth, claims=CLAIMS, lifetime_s=lifetime_s, on_close_route="", on_close_payload={}, now=now
    )


def test_every_request_prolongs_a_session_by_its_lifetime() -> None:
    sessions = Sessions(limit=10, ids=SeededIds(1))
    session = opened(sessions)

    sessions.use(session.session_id, AUTH, now=30.0)
    sessions.use(session.session_id, AUTH, now=100.0)

    assert len(session.session_id) == 13
    assert session.session_id.isalnum()
    with pytest.raises(SessionGone):
        sessions.use(session.session_id, AUTH, now=181.0)


def test_a_session_shows_itself_only_to_its_owner() -> None:
    sessions = Sessions(limit=10, ids=SeededIds(1))
    session = opened(sessions)

    assert sessions.find(session.session_id, AUTH, now=1.0).as_dict()["auth_data"] == AUTH
    with pytest.raises(Unauthorized):
        sessions.find(session.session_id, {"url": "u", "reqnum": 2}, now=1.0)


def test_a_full_table_is_told_before_a_ticket_is_used_up() -> None:
    sessions = Sessions(limit=1, ids=SeededIds(1))
    opened(sessions)

    with pytest.raises(TooManyRequests):
        sessions.check_room()


@pytest.mark.parametrize("lifetime_s", [0.0, -1.0, float("nan"), 1e9])
def test_a_lifetime_that_is_none_is_refused(lifetime_s: float) -> None:
    with pytest.raises(BadRequest):
        opened(Sessions(limit=0, ids=SeededIds(1)), lifetime_s=lifetime_s)


@pytest.mark.anyio
async def test_a_session_in_use_neither_expires_nor_gives_its_load_back_before_its_job_is_done() -> None:
    clock, book, table = FakeClock(0.0), LoadBook(), Sessions(limit=1, ids=SeededIds(1))
    routes = SessionRoutes(table=table, book=book, clock=clock, fetcher=None)  # type: ignore[arg-type]
    session = opened(table, lifetime_s=60.0)
    book.begin(reqnum=CLAIMS.reqnum, request_idx=0, cost=100.0, now=0.0)

    routes.job_began(session)
    clock.jump(500.0)
    assert table.expired(clock.now()) == []
    table.use(session.session_id, AUTH, clock.now())
    routes.job_ended(session)
    assert table.expired(clock.now() + 59.0) == [], "it lives its lifetime beyond its last job"

    routes.job_began(session)
    await routes.close(session)
    while_it_runs = book.current_load
    routes.job_ended(session)

    assert (while_it_runs, book.current_load) == (100.0, 0.0)
    table.check_room()


@pytest.mark.anyio
async def test_a_session_used_while_another_expired_one_is_closed_stays_open() -> None:
    clock, book, table = FakeClock(0.0), LoadBook(), Sessions(limit=2, ids=SeededIds(1))
    first = opened(table, lifetime_s=10.0)
    second = opened(table, lifetime_s=10.0, auth={"url": "u", "reqnum": 2})
    first.on_close_route = "http://example.com/closed"

    class Fetcher:
        """The receiver of the first one's end; meanwhile the second is used, just before its time was over."""

        async def post(self, *_given: object, **_named: object) -> None:
            second.expires_at += 60.0

    routes = SessionRoutes(table=table, book=book, clock=clock, fetcher=Fetcher())  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(routes.close_expired)
        await clock.advance(20.0)
        tasks.cancel_scope.cancel()

    assert (first.is_closed, second.is_closed) == (True, False)

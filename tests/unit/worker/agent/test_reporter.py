"""When a worker reports: at once after a pause, then together what comes thick, and nothing is left out."""

from __future__ import annotations

import aiohttp
import anyio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from comfyfleet.control.worker import LOST_AFTER_S, SILENT_AFTER_S
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import Unavailable
from comfyfleet.wire.workers import WorkerStatusReport
from comfyfleet.worker.agent.lease import Lease
from comfyfleet.worker.agent.load_book import LoadBook, LoadSums
from comfyfleet.worker.agent.reporter import BREATH_S, Reporter, ReportTarget

pytestmark = pytest.mark.anyio


class ControlPlane:
    """Takes every report and keeps what it said."""

    def __init__(self) -> None:
        self.serve_for_s = 0.0  # what its answers grant
        self.is_away = False
        self.posts: list[str] = []
        self.ended: list[int] = []
        self._heard = anyio.Event()

    async def hear(self, request: web.Request) -> web.Response:
        if self.is_away:
            raise web.HTTPServiceUnavailable
        told = await request.json()
        self.posts.append(request.path)
        self.ended += [one["request_idx"] for one in told.get("requests", ())]
        self._heard.set()
        return web.json_response({"success": True, "serve_for_s": self.serve_for_s})

    async def until(self, *, ended: int) -> None:
        with anyio.fail_after(60):
            while len(self.ended) < ended:
                await self._heard.wait()
                self._heard = anyio.Event()


async def test_jobs_that_end_thick_are_reported_together_and_none_is_left_out():
    plane, clock, book = ControlPlane(), FakeClock(), LoadBook()
    app = web.Application()
    app.router.add_post("/{path:.*}", plane.hear)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        reporter = Reporter(
            ReportTarget(report_urls=(str(server.make_url("")).rstrip("/"),), worker_id=1, mtoken="m", incarnation=""),
            book=book,
            describe=lambda sums: a_status(book, sums),
            on_fenced=lambda: None,
            lease=Lease(clock),
            session=session,
            clock=clock,
        )

        def job_ends(number: int) -> None:
            book.begin(reqnum=number, request_idx=number, cost=100.0, now=1.0)
            book.end(reqnum=number, status="Success", now=2.0)
            reporter.wake()

        async with anyio.create_task_group() as tasks:
            job_ends(1)
            tasks.start_soon(reporter.run)
            await plane.until(ended=1)
            first = len(plane.posts)
            for number in range(2, 101):
                job_ends(number)
            await anyio.wait_all_tasks_blocked()
            assert len(plane.posts) == first

            with anyio.fail_after(60):
                while len(plane.ended) < 100:
                    await clock.advance(BREATH_S)

            assert sorted(plane.ended) == list(range(1, 101))
            assert len(plane.posts) <= first + 2
            tasks.cancel_scope.cancel()


async def test_a_control_plane_that_restarts_stops_no_worker_and_one_that_stays_away_does_until_it_is_back():
    plane, clock, book = ControlPlane(), FakeClock(), LoadBook()
    plane.serve_for_s = SILENT_AFTER_S
    app, lease = web.Application(), Lease(clock)
    app.router.add_post("/{path:.*}", plane.hear)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        reporter = Reporter(
            ReportTarget(report_urls=(str(server.make_url("")).rstrip("/"),), worker_id=1, mtoken="m", incarnation="i"),
            book=book,
            describe=lambda sums: a_status(book, sums),
            on_fenced=lambda: None,
            lease=lease,
            session=session,
            clock=clock,
        )

        async def a_second(*, is_away: bool) -> bool:
            """Whether it may serve after it."""
            plane.is_away = is_away
            await reporter.report_once()
            await clock.advance(1.0)
            try:
                lease.demand()
            except Unavailable:
                return False
            return True

        # An idle worker reports each ten seconds; the restart begins just before the next report would go out.
        through_a_restart = [await a_second(is_away=9 <= second < 21) for second in range(40)]
        cut_off = [await a_second(is_away=True) for _ in range(40)]
        back = await a_second(is_away=False)

    assert all(through_a_restart)
    assert 0 < sum(cut_off) <= SILENT_AFTER_S < LOST_AFTER_S, "before its name is another's"
    assert cut_off == sorted(cut_off, reverse=True)
    assert back


def a_status(book: LoadBook, sums: LoadSums) -> WorkerStatusReport:
    return WorkerStatusReport(id=1, mtoken="m", new_load=sums.new_load, num_requests_recieved=book.received)

"""The stream of a durable job's events, over a real store: whoever follows learns of the end, whenever it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from comfyfleet.control.api.job_events import JobEvents
from comfyfleet.control.fresh_links import FreshLinks
from comfyfleet.control.job_feed import JobFeed
from comfyfleet.control.ownership import SoleOwner
from comfyfleet.control.store.connection import ConnectionLost
from comfyfleet.control.store.store import SqlStore, open_sqlite
from comfyfleet.signing import UrlSigner
from comfyfleet.wire.jobs import JobStatus
from support.stored_jobs import NOW, a_job, a_lease

pytestmark = pytest.mark.anyio


class Followed:
    """A leased job's stream. `between` runs right after the look number `at` of a follower at the store."""

    def __init__(self, folder, clock, store: SqlStore) -> None:
        self.store = store
        self.feed = JobFeed()
        self.looks = 0
        self.at = 0
        self.between = self.end_it
        links = FreshLinks(folder, UrlSigner(b"k" * 32, clock), clock)
        self.events_of = JobEvents(store=self, feed=self.feed, ownership=SoleOwner(), links=links)

    async def job(self, job_id):
        return await self._looked(await self.store.job(job_id))

    async def events(self, job_id, after=0):
        return await self._looked(await self.store.events(job_id, after))

    async def _looked(self, found):
        self.looks += 1
        if self.looks == self.at:
            await self.between()
        return found

    async def end_it(self) -> None:
        await self.store.finish("j1", token="t1", status=JobStatus.COMPLETED, result='{"id": 1}', error=None, now=NOW)
        self.feed.news("j1")

    async def kinds(self, after: int = 0) -> list[str]:
        frames = self.events_of.frames(await self.store.job("j1"), after)
        with anyio.fail_after(60):
            return [line[7:] async for frame in frames for line in frame.decode().splitlines() if line[:7] == "event: "]


@pytest.fixture
async def followed(tmp_path, clock) -> AsyncIterator[Followed]:
    store = open_sqlite(tmp_path / "control.sqlite3")
    await store.add_jobs([a_job()])
    await store.lease(a_lease())
    yield Followed(tmp_path, clock, store)
    await store.close()


@pytest.mark.parametrize("look", range(1, 5))
async def test_a_follower_hears_of_the_end_whichever_two_looks_it_falls_between(followed, look):
    followed.at = look

    assert await followed.kinds() == ["queued", "leased", "completed"]


async def test_the_last_frame_carries_the_result_of_a_job_that_ended_during_the_look(followed):
    followed.at = 1

    frames = [frame async for frame in followed.events_of.frames(await followed.store.job("j1"), 2)]

    assert len(frames) == 1
    assert b'"result":{"id": 1}' in frames[0]


async def test_a_follower_who_has_everything_is_let_go(followed):
    await followed.end_it()

    assert await followed.kinds(after=3) == []


async def test_a_follower_is_told_at_a_shutdown_what_there_is_and_comes_back_for_the_rest(followed):
    followed.feed.close()

    assert await followed.kinds() == ["queued", "leased"]


async def test_a_shutdown_during_a_look_lets_the_follower_go(followed):
    async def shut_down() -> None:
        followed.feed.close()

    followed.between, followed.at = shut_down, 4

    assert await followed.kinds() == ["queued", "leased"]


async def test_a_database_that_is_away_for_a_moment_cuts_no_stream(followed):
    async def lost() -> None:
        followed.feed.news("j1")
        await followed.end_it()
        raise ConnectionLost("away")

    followed.between, followed.at = lost, 3

    assert await followed.kinds() == ["queued", "leased", "completed"]


async def test_followers_that_left_are_forgotten():
    feed = JobFeed()
    first, second = feed.watch("j1"), feed.watch("j1")
    assert first is second
    del first, second

    held = feed.watch("j2")

    assert list(feed._news) == ["j2"]
    feed.news("j2")
    assert held.is_set()

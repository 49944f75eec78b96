"""Group commit: a thread owns the writing connection and commits what has piled up meanwhile in one transaction.

A disk sync costs about a millisecond however much it covers, so 64 callers share one. The work handed in is a function
of a connection that does nothing but database calls: if one of a group fails, the group is rolled back and each is run
again alone, so a caller only ever meets its own error. Readers use connections of their own and never wait for it.

Every statement costs a round trip, and in this process a turn at the interpreter's lock, which a busy event loop gives
back late: so what many callers change in the same way is one statement for all of them (`write_batched`).

SQLite has one writer by nature. A database across a socket spends its time on round trips, so there a few threads take
groups side by side; two that meet on a row are told so by the database, and run again one by one.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.to_thread
import structlog

from comfyfleet.control.store.connection import Connection, ConnectionLost
from comfyfleet.control.store.news import News, packed

log = structlog.get_logger()

Item = TypeVar("Item")
T = TypeVar("T")
MAX_GROUP = 256
# So often a change is tried that met another process' change of the same rows.
TRIES = 5

Batch = Callable[[Connection, "Sequence[Item]"], "list[T]"]
"""Makes one kind of change for many callers at once: an outcome for every item, in their order."""


@dataclass(kw_only=True, eq=False, slots=True)
class _Request(Generic[Item, T]):
    """batch: what makes the change for this item and others of its kind. news: for other processes, once it is made."""

    batch: Batch[Item, T]
    item: Item
    news: News | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]
    outcome: T | None = None
    error: BaseException | None = field(default=None)


def _each(connection: Connection, works: Sequence[Callable[[Connection], T]]) -> list[T]:
    """The batch of what has nothing in common."""
    return [work(connection) for work in works]


class Database:
    """`writers` writing connections, each in a thread of its own, and `readers` reading ones.

    teller: the name under which this process tells others of its changes, "" where there are no others.
    quick_reads: a point query costs less than handing it to a thread, so `quick` ones run where they are asked (for a
    database in this process only: one across a network is never quick).
    """

    def __init__(
        self,
        connect: Callable[[bool], Connection],
        *,
        writers: int = 1,
        readers: int = 2,
        quick_reads: bool = False,
        teller: str = "",
    ) -> None:
        """connect(read_only) opens a connection."""
        self._teller = teller
        self._quick = connect(True) if quick_reads else None
        self._queue: queue.SimpleQueue[list[_Request[Any, Any]] | None] = queue.SimpleQueue()
        self._arrived: list[_Request[Any, Any]] = []
        self._writing = [connect(False) for _ in range(writers)]
        self._reading: queue.LifoQueue[Connection] = queue.LifoQueue()
        for _ in range(readers):
            self._reading.put(connect(True))
        self._limiter = anyio.CapacityLimiter(readers)
        self._readers = readers
        self._threads = [
            threading.Thread(target=self._write_groups, args=(connection,), name="store-writer", daemon=True)
            for connection in self._writing
        ]
        for thread in self._threads:
            thread.start()

    async def write(self, work: Callable[[Connection], T], *, news: News | None = None) -> T:
        """Run `work` in a transaction; returns when it is durable."""
        return await self.write_batched(_each, work, news=news)

    async def write_batched(self, batch: Batch[Item, T], item: Item, *, news: News | None = None) -> T:
        """Let `batch` (a function of a module: the same one for all callers) change `item`, together with others."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._arrived or self._arrived[-1].loop is not loop:
            # One wake for whatever else is ready in this turn of the loop: each costs as much as a statement.
            loop.call_soon(self._hand_over)
        self._arrived.append(_Request(batch=batch, item=item, news=news, loop=loop, future=future))
        return await future

    def _hand_over(self) -> None:
        arrived, self._arrived = self._arrived, []
        if arrived:
            self._queue.put(arrived)

    async def read(self, work: Callable[[Connection], T], *, quick: bool = False) -> T:
        """Run `work` on a reading connection; it sees everything that was committed before."""
        if quick and self._quick is not None:
            return work(self._quick)

        def in_thread() -> T:
            connection = self._reading.get()
            try:
                return work(connection)
            except ConnectionLost:  # perhaps long ago, unnoticed: a new one is opened
                return work(connection)
            finally:
                self._reading.put(connection)

        return await anyio.to_thread.run_sync(in_thread, limiter=self._limiter)

    async def close(self) -> None:
        """Finish what is queued, then close."""
        self._hand_over()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            await anyio.to_thread.run_sync(thread.join)
        for _ in range(self._readers):
            self._reading.get().close()
        for connection in self._writing:
            connection.close()
        if self._quick is not None:
            self._quick.close()

    def _write_groups(self, connection: Connection) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            group, is_last = first, False
            while len(group) < MAX_GROUP:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    is_last = True
                    break
                group.extend(more)
            self._commit(connection, group)
            _deliver(group)
            if self._teller:
                _tell(connection, group, self._teller)
            if is_last:
                return

    def _commit(self, connection: Connection, group: list[_Request[Any, Any]], tries: int = TRIES) -> None:
        try:
            _run(connection, group)
        except Exception as error:  # the boundary of a group: whose fault it was is found by running each alone
            if len(group) == 1:
                if tries > 1 and connection.is_collision(error):
                    return self._commit(connection, group, tries - 1)
                group[0].error = error
                return None
            for request in group:
                self._commit(connection, [request])
        return None


def _run(connection: Connection, group: list[_Request[Any, Any]]) -> None:
    try:
        connection.begin()
    except ConnectionLost:  # perhaps long ago, unnoticed: a new one is opened, and nothing was done on the old one
        connection.begin()
    try:
        for batch, requests in _by_batch(group).items():
            outcomes = batch(connection, [request.item for request in requests])
            for request, outcome in zip(requests, outcomes, strict=True):
                request.outcome = outcome
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _tell(connection: Connection, group: list[_Request[Any, Any]], teller: str) -> None:
    """Beside the callers' way, who have their answers."""
    news = [request.news for request in group if request.news is not None and request.error is None]
    if not news:
        return
    try:
        connection.tell(list(packed(news, teller)))
    except ConnectionLost as error:  # the others look again by themselves
        log.warning("store.not_told", error=str(error).strip())


def _by_batch(group: list[_Request[Any, Any]]) -> dict[Batch[Any, Any], list[_Request[Any, Any]]]:
    """In the order in which each kind came first. Callers wait for each other at most here, so any order is theirs."""
    found: dict[Batch[Any, Any], list[_Request[Any, Any]]] = {}
    for request in group:
        found.setdefault(request.batch, []).append(request)
    return found


def _deliver(group: list[_Request[Any, Any]]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Request[Any, Any]]] = {}
    for request in group:
        by_loop.setdefault(request.loop, []).append(request)
    for loop, requests in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, requests)
        except RuntimeError:  # that loop is closed: nobody waits any more, and the change is durable
            continue


def _resolve(requests: list[_Request[Any, Any]]) -> None:
    for request in requests:
        if request.future.done():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(cast("Any", request.outcome))

"""Group commit: a thread owns the writing connection and commits what has piled up meanwhile in one transaction.

A disk sync costs about a millisecond however much it covers, so 64 callers share one. The work handed in is a function
of a connection that does nothing but database calls: if one of a group fails, the group is rolled back and each is run
again alone, so a caller only ever meets its own error. Readers use connections of their own and never wait for it.

SQLite has one writer by nature. A database across a socket spends its time on round trips, so there a few threads take
groups side by side; two that meet on a row are told so by the database, and run again one by one.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.to_thread

from comfyfleet.control.store.connection import Connection

T = TypeVar("T")
MAX_GROUP = 256


@dataclass(kw_only=True, eq=False)
class _Request(Generic[T]):
    work: Callable[[Connection], T]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]
    outcome: T | None = None
    error: BaseException | None = field(default=None)


class Database:
    """`writers` writing connections, each in a thread of its own, and `readers` reading ones.

    quick_reads: a point query costs less than handing it to a thread, so `quick` ones run where they are asked (for a
    database in this process only: one across a network is never quick).
    """

    def __init__(
        self, connect: Callable[[bool], Connection], *, writers: int = 1, readers: int = 2, quick_reads: bool = False
    ) -> None:
        """connect(read_only) opens a connection."""
        self._quick = connect(True) if quick_reads else None
        self._queue: queue.SimpleQueue[_Request[Any] | None] = queue.SimpleQueue()
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

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction; returns when it is durable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Request(work=work, loop=loop, future=future))
        return await future

    async def read(self, work: Callable[[Connection], T], *, quick: bool = False) -> T:
        """Run `work` on a reading connection; it sees everything that was committed before."""
        if quick and self._quick is not None:
            return work(self._quick)

        def in_thread() -> T:
            connection = self._reading.get()
            try:
                return work(connection)
            finally:
                self._reading.put(connection)

        return await anyio.to_thread.run_sync(in_thread, limiter=self._limiter)

    async def close(self) -> None:
        """Finish what is queued, then close."""
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
            group = [first]
            is_last = False
            while len(group) < MAX_GROUP:
                try:
                    request = self._queue.get_nowait()
                except queue.Empty:
                    break
                if request is None:
                    is_last = True
                    break
                group.append(request)
            self._commit(connection, group)
            _deliver(group)
            if is_last:
                return

    def _commit(self, connection: Connection, group: list[_Request[Any]]) -> None:
        try:
            _run(connection, group)
        except Exception as error:  # the boundary of a group: whose fault it was is found by running each alone
            if len(group) == 1:
                group[0].error = error
                return
            for request in group:
                self._commit(connection, [request])


def _run(connection: Connection, group: list[_Request[Any]]) -> None:
    connection.begin()
    try:
        for request in group:
            request.outcome = request.work(connection)
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _deliver(group: list[_Request[Any]]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Request[Any]]] = {}
    for request in group:
        by_loop.setdefault(request.loop, []).append(request)
    for loop, requests in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, requests)
        except RuntimeError:  # that loop is closed: nobody waits any more, and the change is durable
            continue


def _resolve(requests: list[_Request[Any]]) -> None:
    for request in requests:
        if request.future.done():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(cast("Any", request.outcome))

"""A lean HTTP load generator: keep-alive connections, prepared bytes, as fast as possible or at a given rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import uvloop


def post(path: str, body: bytes) -> bytes:
    """A whole request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._data = b""
        self._waiter: asyncio.Future | None = None

    def connection_made(self, transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head = self._data.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self._data.lower().find(b"content-length:")
        length = int(self._data[at + 15 : self._data.find(b"\r", at)])
        if len(self._data) >= head + 4 + length and self._waiter is not None:
            status, self._data = self._data[9:12], b""
            self._waiter.set_result(status)

    async def call(self, request: bytes) -> bytes:
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiter


async def _drive(
    port: int, make: Callable[[int], bytes], connections: int, seconds: float, rate: float, status: bytes
) -> list[float]:
    loop = asyncio.get_running_loop()
    lines = [(await loop.create_connection(_Connection, "127.0.0.1", port))[1] for _ in range(connections)]
    latencies: list[float] = []
    sent = 0
    began = time.perf_counter()

    async def one(line: _Connection) -> None:
        nonlocal sent
        while True:
            number, sent = sent, sent + 1
            due = began + number / rate if rate else time.perf_counter()
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if time.perf_counter() - began > seconds:
                return
            answered = await line.call(make(number))
            latencies.append(time.perf_counter() - due)
            assert answered == status, answered

    async with asyncio.TaskGroup() as calls:
        for line in lines:
            calls.create_task(one(line))
    for line in lines:
        line._transport.close()
    return latencies


def drive(
    port: int,
    make: Callable[[int], bytes],
    *,
    connections: int = 16,
    seconds: float = 4.0,
    rate: float = 0.0,
    status: bytes = b"200",
):
    """(requests per second, latencies in seconds, each counted from when its request was due)."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        latencies = runner.run(_drive(port, make, connections, seconds, rate, status))
    return len(latencies) / seconds, latencies

"""The values of an answer that comes bit by bit: one per line, `data:` before it or not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

import aiohttp
import msgspec


class TransportFailure(ConnectionError):
    """No answer came, or it broke off: refused, reset, cut off or timed out. A repeat is safe."""


class EventStream:
    """Iterate it to its end, or leave early by `async with` or `aclose`: the worker hears that nobody listens.

    Raises ConnectionError where the connection breaks off. Lines that are not JSON (comments, [DONE]) are skipped.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._values = _values(response)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._values)

    async def aclose(self) -> None:
        """Hang up. Again is no error."""
        await self._values.aclose()
        self._response.close()

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


async def _values(response: aiohttp.ClientResponse) -> AsyncGenerator[Any, None]:
    try:
        buffered = b""
        async for chunk in response.content.iter_any():
            *lines, buffered = (buffered + chunk).split(b"\n")
            for line in lines:
                if (value := _value(line)) is not None:
                    yield value
        if (value := _value(buffered)) is not None:
            yield value
    except (aiohttp.ClientError, OSError) as error:
        raise TransportFailure(str(error) or type(error).__name__) from error
    finally:
        response.close()


def _value(line: bytes) -> Any:
    text = line.strip().removeprefix(b"data:").strip()
    try:
        return msgspec.json.decode(text) if text else None
    except msgspec.DecodeError:
        return None

"""`SyncServerless`: the blocking twin of `Serverless`, made from it by running its coroutines on a loop in a thread.

Nothing is written twice: each method below is the async method behind `blocking`, signature and all.

Where a loop runs already (a notebook) it works as well: its own loop has a thread of its own. Callbacks such as
`on_progress` are called on that thread.

    with SyncServerless() as client:
        response = client.get_endpoint("comfyui-json").request("/generate/sync", payload)
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from comfyfleet.client.endpoint import Endpoint
from comfyfleet.client.request import RequestOutcome
from comfyfleet.client.serverless import Serverless
from comfyfleet.client.session import Session
from comfyfleet.client.stream import EventStream

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Twin(Protocol):
    _portal: BlockingPortal
    _twin_of: Any


def blocking(method: Callable[Concatenate[Any, P], Awaitable[R]]) -> Callable[Concatenate[Any, P], R]:
    """`method` of the async object behind a twin, run to its end on the twin's loop."""

    @functools.wraps(method)
    def call(self: _Twin, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._portal.call(functools.partial(method, self._twin_of, *args, **kwargs))

    return call


_END = object()


async def _next_or_end(stream: EventStream) -> Any:
    return await anext(stream, _END)


class _Behind(Generic[T]):
    def __init__(self, portal: BlockingPortal, twin_of: T) -> None:
        self._portal = portal
        self._twin_of = twin_of


class SyncEventStream(_Behind[EventStream]):
    """Blocking twin of `EventStream`: iterate it, or leave early by `with` or `close`."""

    close = blocking(EventStream.aclose)
    _next = blocking(_next_or_end)

    def __iter__(self) -> SyncEventStream:
        return self

    def __next__(self) -> Any:
        value = self._next()
        if value is _END:
            raise StopIteration
        return value

    def __enter__(self) -> SyncEventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _blocking_stream(portal: BlockingPortal, outcome: RequestOutcome) -> RequestOutcome:
    if isinstance(outcome["response"], EventStream):
        outcome["response"] = SyncEventStream(portal, outcome["response"])
    return outcome


class SyncSession(_Behind[Session]):
    """Blocking twin of `Session`."""

    _request = blocking(Session.request)
    is_open = blocking(Session.is_open)
    close = blocking(Session.close)

    @functools.wraps(Session.request)
    def request(self, *args: Any, **options: Any) -> RequestOutcome:
        return _blocking_stream(self._portal, self._request(*args, **options))

    @property
    def url(self) -> str:
        return self._twin_of.url

    @property
    def session_id(self) -> str:
        return self._twin_of.session_id

    def __enter__(self) -> SyncSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SyncEndpoint(_Behind[Endpoint]):
    """Blocking twin of `Endpoint`."""

    _request = blocking(Endpoint.request)
    _session = blocking(Endpoint.session)
    get_workers = blocking(Endpoint.get_workers)

    @functools.wraps(Endpoint.request)
    def request(self, *args: Any, **options: Any) -> RequestOutcome:
        return _blocking_stream(self._portal, self._request(*args, **options))

    @functools.wraps(Endpoint.session)
    def session(self, *args: Any, **options: Any) -> SyncSession:
        return SyncSession(self._portal, self._session(*args, **options))

    @property
    def name(self) -> str:
        return self._twin_of.name

    @property
    def id(self) -> int:
        return self._twin_of.id


class SyncServerless:
    """Blocking twin of `Serverless`; takes the same arguments. Use as a context manager."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._twin_of = Serverless(*args, **options)
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> SyncServerless:
        with ExitStack() as opening:  # what fails half-way leaves no thread behind
            self._portal = opening.enter_context(start_blocking_portal())
            opening.enter_context(self._portal.wrap_async_context_manager(self._twin_of))
            self._stack = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, traceback)
        finally:
            self._portal = None

    def get_endpoint(self, name: str) -> SyncEndpoint:
        return SyncEndpoint(self._opened, self._opened.call(self._twin_of.get_endpoint, name))

    def get_endpoints(self) -> list[SyncEndpoint]:
        return [SyncEndpoint(self._opened, endpoint) for endpoint in self._opened.call(self._twin_of.get_endpoints)]

    @property
    def _opened(self) -> BlockingPortal:
        if self._portal is None:
            raise RuntimeError("the client is not open: use `with SyncServerless() as client`")
        return self._portal

"""`SyncServerless`: the blocking twin of `Serverless`, made from it by running its coroutines on a loop in a thread.

Nothing is written twice: each method below is the async method behind `blocking`, signature and all.

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
from comfyfleet.client.serverless import Serverless

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


class _Behind(Generic[T]):
    def __init__(self, portal: BlockingPortal, twin_of: T) -> None:
        self._portal = portal
        self._twin_of = twin_of


class SyncEndpoint(_Behind[Endpoint]):
    """Blocking twin of `Endpoint`."""

    request = blocking(Endpoint.request)
    get_workers = blocking(Endpoint.get_workers)

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
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._stack.enter_context(self._portal.wrap_async_context_manager(self._twin_of))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        self._portal = None

    _get_endpoint = blocking(Serverless.get_endpoint)
    _get_endpoints = blocking(Serverless.get_endpoints)

    def get_endpoint(self, name: str) -> SyncEndpoint:
        return SyncEndpoint(self._opened, self._get_endpoint(name))

    def get_endpoints(self) -> list[SyncEndpoint]:
        return [SyncEndpoint(self._opened, endpoint) for endpoint in self._get_endpoints()]

    @property
    def _opened(self) -> BlockingPortal:
        if self._portal is None:
            raise RuntimeError("the client is not open: use `with SyncServerless() as client`")
        return self._portal

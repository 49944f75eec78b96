"""A session: a run of requests that stay on one worker, for as long as it is kept alive.

async with await endpoint.session(lifetime=60) as session:
    outcome = await session.request("/generate/sync", payload)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio

from comfyfleet.client.attempts import Attempt, next_step
from comfyfleet.client.request import RequestOutcome, outcome_of
from comfyfleet.client.stream import TransportFailure
from comfyfleet.client.transport import Answer

if TYPE_CHECKING:
    from comfyfleet.client.serverless import Serverless

_CALL_TIMEOUT_S = 10.0
_GONE = 410


class Session:
    """Made by `Endpoint.session`. expiration: epoch seconds, as it was when opened; each request prolongs it."""

    def __init__(
        self, client: Serverless, *, session_id: str, lifetime: float, expiration: float, auth_data: dict[str, Any]
    ) -> None:
        self._client = client
        self.session_id = session_id
        self.lifetime = lifetime
        self.expiration = expiration
        self.auth_data = auth_data
        self.url = str(auth_data["url"])
        self.open = True

    def __repr__(self) -> str:
        return f"Session(url={self.url!r}, open={self.open})"

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.move_on_after(_CALL_TIMEOUT_S, shield=True):  # a slot left taken is a slot nobody can use
            await self.close()

    async def request(
        self,
        route: str,
        payload: Mapping[str, Any],
        *,
        retry: bool = True,
        stream: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - as `Endpoint.request`
    ) -> RequestOutcome:
        """One request to the session's worker. Raises ValueError once the session is closed or expired, and
        ConnectionError when the worker is gone, and the session with it."""
        if not self.open:
            raise ValueError("this session is closed")
        body = {"auth_data": self.auth_data, "payload": dict(payload), "session_id": self.session_id}
        began, repeats = self._client.clock.now(), 0
        with anyio.fail_after(timeout):
            while True:
                answer = await self._post(f"{self.url}{route}", body, stream=stream)
                if answer.status == _GONE:
                    self.open = False
                    raise ValueError("this session has expired")
                step = next_step(
                    Attempt(status=answer.status, retry_after_s=answer.retry_after_s),
                    repeats_done=repeats,
                    retry=retry,
                    max_retries=None,
                    max_wait_s=self._client.max_poll_interval_s,
                    jitter=self._client.ids.uniform(0.0, 1.0),
                )
                if step.action == "finish":
                    return outcome_of(answer, self.auth_data, request_idx=0, latency=self._client.clock.now() - began)
                repeats += 1
                await self._client.clock.sleep(step.wait_s)

    async def is_open(self) -> bool:
        """Whether the worker still has it."""
        if self.open:
            answer = await self._call("/session/get")
            self.open = answer is not None and answer.status == 200
        return self.open

    async def close(self) -> None:
        """End it, and free its slot. Again is no error; neither is a worker that is gone."""
        if self.open:
            self.open = False
            await self._call("/session/end")

    async def _post(self, url: str, body: dict[str, Any], *, stream: bool) -> Answer:
        try:
            if not stream:
                return await self._client.transport.call("POST", url, json=body, timeout_s=None)
            refusal, values = await self._client.transport.stream(url, json=body)
        except TransportFailure:
            self.open = False
            raise
        return refusal or Answer(status=200, body=values, text="", content_type=None, retry_after_s=None)

    async def _call(self, path: str) -> Answer | None:
        body = {"session_id": self.session_id, "session_auth": self.auth_data}
        try:
            return await self._client.transport.call("POST", f"{self.url}{path}", json=body, timeout_s=_CALL_TIMEOUT_S)
        except TransportFailure:
            return None

"""An endpoint as its users see it, and the way of one request: route, post, decide, repeat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from comfyfleet.client.attempts import Attempt, next_step
from comfyfleet.client.hints import hint_of
from comfyfleet.client.request import RequestOutcome, RequestState, ServerlessRequest, outcome_of
from comfyfleet.client.session import Session
from comfyfleet.client.stream import TransportFailure
from comfyfleet.client.transport import Answer, control_plane_error, error_of_status

if TYPE_CHECKING:
    from comfyfleet.client.serverless import Serverless

OnProgress = Callable[[dict[str, Any]], None]
ROUTE_TIMEOUT_S = 15.0
_SESSION_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class EndpointWorker:
    """One worker of an endpoint, as listed. status is vast's lower-case word; measured_perf is the score."""

    id: int
    status: str
    measured_perf: float
    cur_load: float
    reqs_working: int
    url: str
    reason: str


class Endpoint:
    """Made by `Serverless.get_endpoint`. `api_key` is the endpoint's own; it routes and does nothing else."""

    def __init__(self, client: Serverless, *, name: str, id: int, api_key: str) -> None:
        self._client = client
        self.name = name
        self.id = id
        self.api_key = api_key

    def __repr__(self) -> str:
        return f"Endpoint(name={self.name!r}, id={self.id})"

    async def request(
        self,
        route: str,
        payload: Mapping[str, Any],
        serverless_request: ServerlessRequest | None = None,
        cost: float = 100.0,
        retry: bool = True,
        stream: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - the known client's name
        *,
        worker_timeout: float | None = None,
        max_retries: int | None = None,
        hint: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> RequestOutcome:
        """Route one request to a worker and return its answer, whatever its status.

        timeout: seconds in all (None: as long as it takes); passing it raises TimeoutError. retry, max_retries: for
        answers that a repeat can help and for lost workers. on_progress: called with each snapshot while the job
        runs. hint: models and shape for the router, read from the payload's workflow unless given. Raises
        RuntimeError when the control plane refuses to route (unknown endpoint, bad key).
        """
        watched = serverless_request or ServerlessRequest()
        way = _Way(self, self._client, watched, cost=cost, hint=hint_of(payload) if hint is None else hint)
        watched.create_time = self._client.clock.now()
        try:
            with anyio.fail_after(timeout) if timeout is not None else nullcontext():
                outcome = await way.go(
                    route,
                    dict(payload),
                    retry=retry,
                    max_retries=max_retries,
                    worker_timeout_s=worker_timeout,
                    stream=stream,
                    on_progress=on_progress,
                )
        except BaseException as error:
            is_cancelled = isinstance(error, anyio.get_cancelled_exc_class())
            watched.status = RequestState.CANCELLED if is_cancelled else RequestState.ERRORED
            raise
        watched.status = RequestState.COMPLETE
        watched.complete_time = self._client.clock.now()
        return outcome

    async def session(
        self,
        cost: float = 100.0,
        lifetime: float = 60.0,
        on_close_route: str | None = None,
        on_close_payload: Mapping[str, Any] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the known client's name
    ) -> Session:
        """Open a session: requests that stay on one worker. lifetime: seconds, added by each request.

        Raises the error that a worker answers, TimeoutError after `timeout`.
        """
        wanted = {"lifetime": lifetime, "on_close_route": on_close_route, "on_close_payload": on_close_payload}
        outcome = await self.request(
            "/session/create", wanted, cost=cost, timeout=timeout, worker_timeout=_SESSION_TIMEOUT_S, hint={}
        )
        if not outcome["ok"]:
            raise error_of_status(outcome["status"], f"no session: {outcome['text'][:300]}")
        return Session(
            self._client,
            session_id=str(outcome["response"]["session_id"]),
            lifetime=lifetime,
            expiration=float(outcome["response"]["expiration"]),
            auth_data=outcome["auth_data"],
        )

    async def get_workers(self) -> list[EndpointWorker]:
        """The endpoint's workers, whatever their state."""
        listing = await self._client.post("/get_endpoint_workers/", {"id": self.id})
        if isinstance(listing, dict):
            return []
        return [
            EndpointWorker(
                id=int(row["id"]),
                status=str(row.get("status", "UNKNOWN")),
                measured_perf=float(row.get("measured_perf") or 0.0),
                cur_load=float(row.get("cur_load") or 0.0),
                reqs_working=int(row.get("reqs_working") or 0),
                url=str(row.get("url", "")),
                reason=str(row.get("reason", "") or row.get("error_msg", "")),
            )
            for row in listing
        ]


class _Way:
    """One request on its way. Its `request_idx` stays the same over every repeat: that is what makes repeats safe."""

    def __init__(
        self,
        endpoint: Endpoint,
        client: Serverless,
        watched: ServerlessRequest,
        *,
        cost: float,
        hint: Mapping[str, Any] | None,
    ) -> None:
        self._endpoint = endpoint
        self._client = client
        self._watched = watched
        self._cost = cost
        self._hint = hint
        self._first_post_at: float | None = None

    async def go(
        self,
        route: str,
        payload: dict[str, Any],
        *,
        retry: bool,
        max_retries: int | None,
        worker_timeout_s: float | None,
        stream: bool,
        on_progress: OnProgress | None,
    ) -> RequestOutcome:
        repeats = 0
        while True:
            auth_data = await self._route()
            self._watched.status = RequestState.IN_PROGRESS
            now = self._client.clock.now()
            self._watched.start_time = self._watched.start_time or now
            self._first_post_at = self._first_post_at or now
            url = f"{auth_data['url']}{route}"
            body = {"auth_data": auth_data, "payload": payload, "session_id": None}
            values = None
            answer: Answer | None
            failure: TransportFailure | None = None
            try:
                if stream:
                    answer, values = await self._client.transport.stream(url, json=body)
                else:
                    answer = await self._post(url, body, auth_data, worker_timeout_s, on_progress)
            except TransportFailure as error:
                answer, failure = None, error
            if values is not None:
                return self._outcome(
                    auth_data, Answer(status=200, body=values, text="", content_type=None, retry_after_s=None)
                )
            step = next_step(
                Attempt(
                    status=answer.status if answer else None, retry_after_s=answer.retry_after_s if answer else None
                ),
                repeats_done=repeats,
                retry=retry,
                max_retries=max_retries,
                max_wait_s=self._client.max_poll_interval_s,
                jitter=self._client.ids.uniform(0.0, 1.0),
            )
            if step.action == "finish":
                if answer is None:
                    raise ConnectionError(f"worker {auth_data['url']} gave no answer: {failure}") from failure
                return self._outcome(auth_data, answer)
            repeats += 1
            self._watched.status = RequestState.RETRYING
            await self._client.clock.sleep(step.wait_s)

    async def _route(self) -> dict[str, Any]:
        """Ask for a worker until there is one; a control plane that restarts is waited for."""
        polls = failures = 0
        self._watched.status = RequestState.QUEUED
        while True:
            body: dict[str, Any] = {
                "endpoint": self._endpoint.name,
                "cost": self._cost,
                "request_idx": self._watched.request_idx,
                "replay_timeout": 60.0,
            }
            if self._hint:
                body["hint"] = dict(self._hint)
            try:
                answer = await self._client.transport.call(
                    "POST",
                    f"{self._client.url}/route/",
                    json=body,
                    key=self._endpoint.api_key,
                    timeout_s=ROUTE_TIMEOUT_S,
                )
            except TransportFailure as error:
                failures += 1
                if failures > 20:
                    raise RuntimeError(f"Failed to route endpoint: {error}") from error
                await self._client.clock.sleep(min(0.1 * 2.0 ** min(failures, 8), self._client.max_poll_interval_s))
                continue
            if answer.status >= 500 and failures < 20:
                failures += 1
                await self._client.clock.sleep(min(0.1 * 2.0 ** min(failures, 8), self._client.max_poll_interval_s))
                continue
            failures = 0  # in a row: a wait of hours may outlast many restarts
            if answer.status != 200 or not isinstance(answer.body, dict):
                raise RuntimeError(f"Failed to route endpoint: {control_plane_error(answer)}")
            self._watched.request_idx = int(answer.body.get("request_idx") or self._watched.request_idx)
            if "url" in answer.body:
                self._watched.waiting_for = ""
                return answer.body
            self._watched.status = RequestState.POLLING
            self._watched.waiting_for = str(answer.body.get("reason") or answer.body.get("status") or "")
            # The control plane holds a poll until something changes, so a short pause is enough.
            polls += 1
            await self._client.clock.sleep(min(0.1 * polls, 1.0))

    async def _post(
        self,
        url: str,
        body: dict[str, Any],
        auth_data: dict[str, Any],
        worker_timeout_s: float | None,
        on_progress: OnProgress | None,
    ) -> Answer:
        post: Callable[[], Awaitable[Answer]] = lambda: self._client.transport.call(  # noqa: E731
            "POST", url, json=body, timeout_s=worker_timeout_s
        )
        if on_progress is None:
            return await post()
        # A failure of the one must not arrive wrapped in the other's task group: carry it out by hand.
        answer: Answer | None = None
        failure: Exception = TransportFailure("no answer")
        async with anyio.create_task_group() as following:

            async def follow() -> None:
                nonlocal failure
                try:
                    await self._follow_progress(auth_data, on_progress)
                except Exception as error:  # the caller's own, from on_progress: it ends the request
                    failure = error
                    following.cancel_scope.cancel()

            following.start_soon(follow, name="progress")
            try:
                answer = await post()
            except TransportFailure as error:
                failure = error
            following.cancel_scope.cancel()
        if answer is None:
            raise failure
        return answer

    async def _follow_progress(self, auth_data: dict[str, Any], on_progress: OnProgress) -> None:
        """Progress is a courtesy: a worker that has none (a foreign one) just gives none."""
        try:
            _, values = await self._client.transport.stream(
                f"{auth_data['url']}/progress", json={"auth_data": auth_data}
            )
            if values is None:
                return
            async with values:
                async for value in values:
                    if isinstance(value, dict):
                        self._watched.progress = value
                        on_progress(value)
        except TransportFailure:
            return

    def _outcome(self, auth_data: dict[str, Any], answer: Answer) -> RequestOutcome:
        started = self._first_post_at if self._first_post_at is not None else self._client.clock.now()
        latency = self._client.clock.now() - started
        return outcome_of(answer, auth_data, request_idx=self._watched.request_idx, latency=latency)

"""The client against a real HTTP server that plays control plane and worker in one."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest
from aiohttp import web

from comfyfleet import Serverless, ServerlessRequest, SyncServerless
from comfyfleet.ids import SeededIds
from comfyfleet.wire.errors import NotFound, Unauthorized

pytestmark = pytest.mark.anyio


class Fleet:
    """Counts what it is asked; `answers` are given by the worker in turn, the last one for ever."""

    def __init__(self) -> None:
        self.route_bodies: list[dict[str, Any]] = []
        self.route_keys: list[str] = []
        self.worker_requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.answers: list[Callable[[], web.StreamResponse]] = [lambda: web.json_response({"status": "completed"})]
        self.waits_first = 0
        self.worker_url = ""
        self.route_statuses: list[int] = []  # of the next calls; 200 once they are used up
        self.sessions: set[str] = set()
        self.ended: list[str] = []
        self.hangs = self.cut_streams = False

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/v0/endptjobs/", self.endpoints)
        app.router.add_post("/route/", self.route)
        app.router.add_post("/generate/sync", self.generate)
        app.router.add_post("/progress", self.progress)
        app.router.add_post("/session/{verb}", self.session)
        return app

    async def endpoints(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer account":
            return web.json_response({"error": "unauthorized", "msg": "no such key"}, status=401)
        row = {"id": 7, "endpoint_name": "comfyui-json", "api_key": "endpoint-key", "user_id": 1, "created_at": 0.0}
        return web.json_response({"success": True, "results": [row]})

    async def route(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.route_bodies.append(body)
        self.route_keys.append(request.headers["Authorization"])
        if (status := self.route_statuses.pop(0) if self.route_statuses else 200) != 200:
            return web.json_response({"error": "unavailable", "msg": "restarting"}, status=status)
        if self.waits_first:
            self.waits_first -= 1
            return web.json_response(
                {"endpoint": "comfyui-json", "status": "1 loading", "request_idx": 41, "reason": "booting"}
            )
        ready = {
            "endpoint": "comfyui-json",
            "url": self.worker_url,
            "cost": body["cost"],
            "reqnum": len(self.route_bodies),
        }
        return web.json_response({**ready, "request_idx": 41, "signature": "s", "ticket": "t"})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        call = await request.json()
        if call.get("session_id") is not None and call["session_id"] not in self.sessions:
            return web.json_response({"error": "invalid session"}, status=410)
        self.worker_requests.append((dict(request.headers), call))
        if self.hangs:
            await anyio.sleep(60)
        if self.cut_streams:
            cut = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Content-Length": "1000"})
            await cut.prepare(request)
            await cut.write(b'data: {"n": 1}\n\n')
            assert request.transport is not None
            request.transport.abort()
            return cut
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()

    async def session(self, request: web.Request) -> web.Response:
        call, verb = await request.json(), request.match_info["verb"]
        if verb == "create":
            name = f"s{len(self.sessions) + len(self.ended) + 1}"
            self.sessions.add(name)
            return web.json_response({"session_id": name, "expiration": 1.0}, status=201)
        if call["session_id"] not in self.sessions or call["session_auth"]["ticket"] != "t":
            return web.json_response({"error": "session does not exist"}, status=400)
        if verb == "end":
            self.sessions.discard(call["session_id"])
            self.ended.append(call["session_id"])
        return web.json_response({"auth_data": call["session_auth"]})

    async def progress(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b'data: {"percentage": 50}\n\n')
        return answer


@asynccontextmanager
async def a_fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    runner = web.AppRunner(fleet.app(), handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fleet.worker_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fleet
    finally:
        await runner.cleanup()


def a_client(fleet: Fleet, key: str = "account") -> Serverless:
    return Serverless(key, url=fleet.worker_url, ids=SeededIds(1), max_poll_interval=0.001)


async def test_a_request_is_routed_and_its_answer_comes_back_with_all_known_fields() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        outcome = await endpoint.request("/generate/sync", {"input": {"request_id": ""}})

    assert outcome["response"] == {"status": "completed"}
    assert (outcome["ok"], outcome["status"], outcome["request_idx"]) == (True, 200, 41)
    assert outcome["auth_data"]["ticket"] == "t"
    assert outcome["latency"] > 0
    assert fleet.worker_requests[0][1]["payload"] == {"input": {"request_id": ""}}


async def test_the_endpoints_own_key_routes_and_no_key_ever_reaches_a_worker() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        await endpoint.request("/generate/sync", {})

    headers, body = fleet.worker_requests[0]
    assert fleet.route_keys == ["Bearer endpoint-key"]
    assert "Authorization" not in headers
    assert "endpoint-key" not in json.dumps(body)
    assert "account" not in json.dumps(body)


async def test_a_waiting_request_polls_with_its_own_number_and_says_what_it_waits_for() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        fleet.waits_first = 2
        endpoint = await client.get_endpoint(name="comfyui-json")
        await endpoint.request("/generate/sync", {})

    assert [body["request_idx"] for body in fleet.route_bodies] == [0, 41, 41]


async def test_a_refused_workflow_is_answered_once_and_not_repeated() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        fleet.answers = [
            lambda: web.json_response({"status": "failed", "error": {"code": "workflow_refused"}}, status=422)
        ]
        endpoint = await client.get_endpoint(name="comfyui-json")
        outcome = await endpoint.request("/generate/sync", {})

    assert (outcome["ok"], outcome["status"]) == (False, 422)
    assert outcome["response"]["error"]["code"] == "workflow_refused"
    assert len(fleet.worker_requests) == 1


async def test_a_full_worker_is_tried_again_with_the_same_number() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        fleet.answers = [lambda: web.Response(status=503), lambda: web.json_response({"status": "completed"})]
        endpoint = await client.get_endpoint(name="comfyui-json")
        outcome = await endpoint.request("/generate/sync", {})

    assert outcome["ok"]
    assert [body["request_idx"] for body in fleet.route_bodies] == [0, 41]


async def test_a_dead_worker_costs_a_handful_of_calls_and_then_an_error() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        fleet.worker_url = "http://127.0.0.1:9"
        watched = ServerlessRequest()
        with pytest.raises(ConnectionError):
            await endpoint.request("/generate/sync", {}, watched)

    assert len(fleet.route_bodies) == 6
    assert watched.status == "Errored"


async def test_a_caller_who_gives_a_timeout_gets_it() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        fleet.answers = [lambda: web.Response(status=503)]
        endpoint = await client.get_endpoint(name="comfyui-json")
        with pytest.raises(TimeoutError):
            await endpoint.request("/generate/sync", {}, timeout=0.05)


async def test_progress_is_shown_while_a_job_runs_and_is_no_condition_for_its_answer() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        outcome = await endpoint.request("/generate/sync", {}, on_progress=lambda snapshot: None)

    assert outcome["ok"]


async def test_an_unknown_endpoint_and_a_wrong_key_are_told_apart() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        with pytest.raises(NotFound, match="Endpoint other could not be found"):
            await client.get_endpoint(name="other")
        async with a_client(fleet, key="wrong") as stranger:
            with pytest.raises(Unauthorized, match="HTTP 401"):
                await stranger.get_endpoints()


async def test_the_blocking_twin_does_the_same_from_a_plain_thread() -> None:
    from anyio import to_thread

    def blocking_caller(url: str) -> Any:
        with SyncServerless("account", url=url) as client:
            return client.get_endpoint("comfyui-json").request("/generate/sync", {"input": {}})["response"]

    async with a_fleet() as fleet:
        assert await to_thread.run_sync(blocking_caller, fleet.worker_url) == {"status": "completed"}


def a_stream(*values: dict[str, Any]) -> Callable[[], web.StreamResponse]:
    lines = b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)
    return lambda: web.Response(body=lines, content_type="text/event-stream")


async def test_a_stream_is_iterated_to_its_end_or_left_early() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        fleet.answers = [a_stream({"n": 1}, {"n": 2}, {"n": 3})]
        endpoint = await client.get_endpoint(name="comfyui-json")
        whole = (await endpoint.request("/generate/sync", {}, stream=True))["response"]
        assert [value async for value in whole] == [{"n": 1}, {"n": 2}, {"n": 3}]

        async with (await endpoint.request("/generate/sync", {}, stream=True))["response"] as left:
            assert await anext(left) == {"n": 1}
        assert [value async for value in left] == []
        await left.aclose()


async def test_a_stream_that_breaks_off_is_a_connection_error() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        fleet.cut_streams = True
        endpoint = await client.get_endpoint(name="comfyui-json")
        answer = await endpoint.request("/generate/sync", {}, stream=True)
        with pytest.raises(ConnectionError):
            [value async for value in answer["response"]]


async def test_an_error_of_the_callers_own_progress_callback_ends_its_request_as_it_is() -> None:
    def complain(_: dict[str, Any]) -> None:
        raise KeyError("mine")

    async with a_fleet() as fleet, a_client(fleet) as client:
        fleet.hangs = True
        endpoint = await client.get_endpoint(name="comfyui-json")
        with pytest.raises(KeyError, match="mine"):
            await endpoint.request("/generate/sync", {}, on_progress=complain, timeout=60.0)


async def test_a_control_plane_may_fail_any_number_of_times_in_a_long_wait_but_not_in_a_row() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        fleet.route_statuses = [503, 200] * 25
        fleet.waits_first = 25
        assert (await endpoint.request("/generate/sync", {}))["ok"]

        fleet.route_statuses = [503] * 30
        with pytest.raises(RuntimeError, match="503"):
            await endpoint.request("/generate/sync", {})


async def test_a_session_stays_at_its_worker_until_it_is_closed_or_expires() -> None:
    async with a_fleet() as fleet, a_client(fleet) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        async with await endpoint.session(lifetime=30) as session:
            answers = [await session.request("/generate/sync", {"n": number}) for number in range(2)]
            assert await session.is_open()
        routed = len(fleet.route_bodies)
        with pytest.raises(ValueError, match="closed"):
            await session.request("/generate/sync", {})
        await session.close()

        expired = await endpoint.session()
        fleet.sessions.clear()
        still_open = await expired.is_open()
        expired.open = True
        with pytest.raises(ValueError, match="expired"):
            await expired.request("/generate/sync", {})

    assert [answer["ok"] for answer in answers] == [True, True]
    assert [call["session_id"] for _, call in fleet.worker_requests[:2]] == ["s1", "s1"]
    assert [call["payload"] for _, call in fleet.worker_requests[:2]] == [{"n": 0}, {"n": 1}]
    assert (routed, still_open) == (1, False)
    assert fleet.ended == ["s1"]


async def test_the_blocking_twin_streams_and_holds_sessions_even_where_a_loop_runs() -> None:
    def use(url: str) -> Any:
        with SyncServerless("account", url=url) as client:
            endpoint = client.get_endpoint("comfyui-json")
            with endpoint.session() as session:
                streamed = list(session.request("/generate/sync", {}, stream=True)["response"])
            with endpoint.request("/generate/sync", {}, stream=True)["response"] as left:
                first = next(left)
        return streamed, first

    async def in_a_notebook(url: str) -> Any:
        return use(url)  # called on the thread of a loop that runs, as a cell is

    async with a_fleet() as fleet:
        fleet.answers = [a_stream({"n": 1}, {"n": 2})]
        told = await anyio.to_thread.run_sync(lambda: anyio.run(in_a_notebook, fleet.worker_url))

    assert told == ([{"n": 1}, {"n": 2}], {"n": 1})


async def test_a_blocking_client_that_cannot_open_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: Any) -> None:
        raise OSError("no sockets left")

    monkeypatch.setattr("comfyfleet.client.transport.Transport.open", refuse)

    def use() -> int:
        before = threading.active_count()
        with pytest.raises(OSError, match="no sockets left"):
            SyncServerless("account", url="http://127.0.0.1:9").__enter__()
        return threading.active_count() - before

    assert await anyio.to_thread.run_sync(use) <= 0

"""The client against a real HTTP server that plays control plane and worker in one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

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

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/v0/endptjobs/", self.endpoints)
        app.router.add_post("/route/", self.route)
        app.router.add_post("/generate/sync", self.generate)
        app.router.add_post("/progress", self.progress)
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
        self.worker_requests.append((dict(request.headers), await request.json()))
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()

    async def progress(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b'data: {"percentage": 50}\n\n')
        return answer


@asynccontextmanager
async def a_fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    runner = web.AppRunner(fleet.app())
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

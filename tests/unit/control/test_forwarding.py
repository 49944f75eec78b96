"""The door of a control plane among several: who answers a request, and what a caller sees when an owner dies."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import pytest
from aiohttp import web
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from comfyfleet.control.catalog import Catalog
from comfyfleet.control.forwarding import HOP, Forwarding, forwarding_session
from comfyfleet.control.ownership import Replica
from comfyfleet.control.records import Endpoint, Workergroup, WorkerRow
from comfyfleet.control.whose import Asked, Whose
from comfyfleet.control.workers import Workers
from comfyfleet.ids import SeededIds
from comfyfleet.wire.jobs import JobStatus

pytestmark = pytest.mark.anyio

ROUTE = json.dumps({"endpoint": "comfy", "cost": 1}).encode()
GRAPH = {"workflow_json": {}}


class Owner:
    """Another replica's HTTP side: answers what it is told, or closes the connection."""

    def __init__(self) -> None:
        self.heard: list[SimpleNamespace] = []
        self.answers: list[object] = []
        self.was_asked = anyio.Event()

    async def __aenter__(self):
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.replica = Replica(id="other", url=f"http://127.0.0.1:{self.runner.addresses[0][1]}")
        return self

    async def __aexit__(self, *_error):
        await self.runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.heard.append(SimpleNamespace(path=request.path_qs, headers=request.headers.copy(), body=body))
        self.was_asked.set()
        answer = self.answers.pop(0) if self.answers else "there"
        if answer == "cut":
            request.transport.close()
            return web.Response()
        if isinstance(answer, int):
            return web.Response(status=answer)
        if answer == "never":
            await anyio.sleep_forever()
        return web.Response(text=str(answer), headers={"X-Kept": "yes"})


class Ownership:
    """What `Replicas` says, as a test wants it; each kick takes the next owner."""

    def __init__(self, owner: Replica | None, *then: Replica | str | None) -> None:
        self.id = "me"
        self._owner: Replica | str | None = owner
        self._then = list(then)
        self._scopes: list[anyio.CancelScope] = []
        self.waited_s = 0.0

    def owns(self, _endpoint_id: int) -> bool:
        return self._owner == "me"

    def owner_of(self, _endpoint_id: int):
        return self._owner if isinstance(self._owner, Replica) else None

    def others(self) -> list[Replica]:
        return [self._owner] if isinstance(self._owner, Replica) else []

    def kick(self) -> None:
        if self._then:
            self.now(self._then.pop(0))

    def now(self, owner: Replica | str | None) -> None:
        self._owner = owner
        for scope in self._scopes:
            scope.cancel()

    async def changed(self, at_most_s: float) -> None:
        self.waited_s += at_most_s
        await anyio.sleep(0.001)

    def monotonic(self) -> float:
        """A clock on which only waiting for an owner that never comes takes time."""
        return 0.0 if self._then or self._owner else self.waited_s

    def watch(self, _endpoint_id: int, scope: anyio.CancelScope):
        self._scopes.append(scope)
        return lambda: self._scopes.remove(scope) if scope in self._scopes else None


class Mirror:
    def __init__(self) -> None:
        self.refreshed = 0
        self.brings: list = []
        self.version = 0

    async def refresh(self, seen: int | None = None) -> bool:
        self.refreshed += 1
        if self.brings:
            self.brings.pop(0)()
            return True
        return False


class Stored:
    """The two look-ups that say whose a worker and a job are."""

    async def get(self, _kind, worker_id):
        return WorkerRow(id=7, endpoint_id=1, workergroup_id=0, body="{}") if worker_id == 7 else None

    async def job(self, job_id):
        statuses = {"waits": JobStatus.QUEUED, "runs": JobStatus.RUNNING, "done": JobStatus.COMPLETED}
        status = statuses.get(job_id)
        return status and SimpleNamespace(status=status, endpoint_id=1, is_final=status is JobStatus.COMPLETED)


def an_endpoint() -> Endpoint:
    return Endpoint(id=1, endpoint_name="comfy", created_at=0.0)


@contextlib.asynccontextmanager
async def a_door(ownership: Ownership):
    """`door.ask(method, path, body)`; the app behind it answers `here`, and 401 while `keys` is empty."""
    catalog = Catalog([an_endpoint()], [Workergroup(id=3, endpoint_id=1, endpoint_name="comfy", created_at=0.0)])
    keys = {"good"}

    async def here(request: Request) -> PlainTextResponse:
        assert await request.body() is not None
        return PlainTextResponse("here", status_code=200 if keys else 401)

    methods = ["GET", "POST", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", here, methods=methods)])
    mirror = Mirror()
    whose = Whose(catalog=catalog, workers=Workers(), store=Stored(), ids=SeededIds(1))
    async with forwarding_session(None) as session:
        door = Forwarding(app, replicas=ownership, whose=whose, mirror=mirror, session=session, clock=ownership)

        async def ask(method: str, path: str, body: bytes = b"", **headers: str) -> SimpleNamespace:
            sent: list[dict] = []
            path, _, query = path.partition("?")
            scope = {
                "type": "http",
                "method": method,
                "path": path,
                "raw_path": path.encode(),
                "query_string": query.encode(),
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }

            async def receive() -> dict:
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(message) -> None:
                sent.append(message)

            with anyio.fail_after(60):
                await door(scope, receive, send)
            text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
            return SimpleNamespace(status=sent[0]["status"], headers=dict(sent[0]["headers"]), text=text)

        yield SimpleNamespace(ask=ask, mirror=mirror, catalog=catalog, keys=keys, whose=whose)


async def test_a_request_for_another_replicas_endpoint_is_answered_there_with_all_that_came_with_it():
    async with Owner() as owner, a_door(Ownership(owner.replica)) as door:
        answer = await door.ask(
            "POST", "/route/?api_key=k%20k", ROUTE, host="fleet.example", authorization="Bearer secret"
        )
        assert (answer.status, answer.text, answer.headers[b"x-kept"]) == (200, "there", b"yes")
        (heard,) = owner.heard
        assert (heard.path, heard.body) == ("/route/?api_key=k%20k", ROUTE)
        assert heard.headers["Authorization"] == "Bearer secret"
        assert heard.headers["Host"] == "fleet.example"
        assert heard.headers[HOP] == "me"


async def test_what_is_ours_or_nobodys_is_answered_here():
    async with a_door(Ownership("me")) as door:
        for method, path, body in (
            ("POST", "/route/", ROUTE),
            ("POST", "/route/", b"no json"),
            ("GET", "/health", b""),
        ):
            assert (await door.ask(method, path, body)).text == "here"


async def test_a_passed_request_is_passed_on_no_further():
    async with Owner() as owner, a_door(Ownership(owner.replica)) as door:
        assert (await door.ask("POST", "/route/", ROUTE, **{HOP: "somebody"})).status == 421
        assert owner.heard == []


async def test_an_owner_that_says_it_is_none_is_asked_no_more_once_another_is():
    async with Owner() as first, Owner() as second:
        first.answers = [421, 421]
        async with a_door(Ownership(first.replica, first.replica, second.replica)) as door:
            assert (await door.ask("POST", "/route/", ROUTE)).text == "there"
        assert (len(first.heard), len(second.heard)) == (2, 1)


@pytest.mark.parametrize("death", ["cut", "never"])
async def test_a_request_whose_owner_died_with_it_is_sent_again_to_the_next(death):
    async with Owner() as first, Owner() as second:
        first.answers = [death]
        ownership = Ownership(first.replica, second.replica)
        async with a_door(ownership) as door, anyio.create_task_group() as watching:

            async def another_takes_over() -> None:
                await first.was_asked.wait()
                if death == "never":
                    ownership.now(second.replica)

            watching.start_soon(another_takes_over)
            assert (await door.ask("POST", "/route/", ROUTE)).text == "there"
        assert len(second.heard) == 1


async def test_a_dead_owners_request_waits_and_is_answered_here_when_the_endpoint_becomes_ours():
    gone = Replica(id="gone", url="http://127.0.0.1:1")
    async with a_door(Ownership(gone, gone, None, "me")) as door:
        assert (await door.ask("POST", "/route/", ROUTE)).text == "here"


@pytest.mark.parametrize(("path", "status"), [("/route/", 200), ("/v1/jobs", 200), ("/worker_status/", 503)])
async def test_without_an_owner_a_caller_is_answered_here_in_the_end_and_a_worker_comes_again(path, status):
    ownership = Ownership(None)
    async with a_door(ownership) as door:
        body = json.dumps({"endpoint": "comfy", "id": 7, "input": GRAPH}).encode()
        assert (await door.ask("POST", path, body)).status == status
        assert 1.9 < ownership.waited_s < 7.0


async def test_what_must_not_be_done_twice_is_not_sent_twice():
    async with Owner() as owner, a_door(Ownership(owner.replica)) as door:
        owner.answers = ["cut"]
        answer = await door.ask("POST", "/v1/workers", ROUTE)
        assert (answer.status, len(owner.heard)) == (503, 1)


async def test_a_job_is_sent_again_under_one_key_of_its_own_or_of_ours():
    async with Owner() as owner, a_door(Ownership(owner.replica, owner.replica)) as door:
        owner.answers = ["cut"]
        body = json.dumps({"endpoint": "comfy", "input": GRAPH}).encode()
        assert (await door.ask("POST", "/v1/jobs", body)).text == "there"
        ours, again = (heard.headers["Idempotency-Key"] for heard in owner.heard)
        assert ours == again
        for given, header in (
            ({"idempotency_key": "k"}, {}),
            ({"input": {**GRAPH, "request_id": "r"}}, {}),
            ({}, {"idempotency-key": "theirs"}),
        ):
            body = json.dumps({"endpoint": "comfy", "input": GRAPH, **given}).encode()
            await door.ask("POST", "/v1/jobs", body, **header)
            assert owner.heard[-1].headers.get("Idempotency-Key") == header.get("idempotency-key")


async def test_nobody_is_told_that_a_thing_is_unknown_before_the_database_was_asked():
    async with a_door(Ownership("me")) as door:
        door.keys.clear()
        door.mirror.brings = [lambda: door.keys.add("made elsewhere")]
        assert (await door.ask("POST", "/route/", ROUTE)).status == 200
        door.keys.clear()
        assert (await door.ask("POST", "/route/", ROUTE)).status == 401
        assert door.mirror.refreshed == 2


async def test_an_endpoint_made_elsewhere_is_looked_up_before_it_is_anybodys():
    async with Owner() as owner, a_door(Ownership(owner.replica)) as door:
        door.catalog.drop_endpoint(1)
        door.mirror.brings = [lambda: door.catalog.put_endpoint(an_endpoint())]
        assert (await door.ask("POST", "/route/", ROUTE)).text == "there"


@pytest.mark.parametrize(
    ("method", "path", "body", "endpoint_id"),
    [
        ("POST", "/route/", {"endpoint": "comfy"}, 1),
        ("POST", "/route/", {"endpoint": "another"}, None),
        ("POST", "/worker_status/", {"id": 7}, 1),
        ("POST", "/worker_status/", {"id": 8}, None),
        ("POST", "/delete_requests/", {"worker_id": 7}, 1),
        ("POST", "/v1/jobs", {"endpoint": 1}, 1),
        ("POST", "/v1/jobs/batch", {"jobs": [{"endpoint": "comfy"}, {"endpoint": "x"}]}, 1),
        ("POST", "/v1/jobs/runs/cancel", {}, 1),
        ("POST", "/v1/jobs/done/cancel", {}, None),
        ("GET", "/v1/jobs/waits", {}, 1),
        ("GET", "/v1/jobs/runs", {}, None),
        ("GET", "/v1/jobs/none", {}, None),
        ("POST", "/get_endpoint_workers/", {"id": 1}, 1),
        ("POST", "/get_endpoint_workers/", {"endpoint": "comfy"}, 1),
        ("POST", "/update_workers/", {"workergroup_id": 3}, 1),
        ("DELETE", "/api/v0/endptjobs/1/", {}, 1),
        ("DELETE", "/api/v0/autojobs/3/", {}, 1),
        ("DELETE", "/v1/workers/7", {}, 1),
        ("GET", "/v1/workers/7/logs", {}, 1),
    ],
)
async def test_whose_a_request_is(method, path, body, endpoint_id):
    async with a_door(Ownership("me")) as door:
        rule = door.whose.rule(method, path)
        asked = Asked(scope={"method": method, "path": path}, body=json.dumps(body).encode())
        assert await rule.find(asked) == endpoint_id


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/j/events", "/v1/usage", "/api/v0/endptjobs/", "/health"])
async def test_what_the_database_knows_is_nobodys(path):
    async with a_door(Ownership("me")) as door:
        assert door.whose.rule("GET", path) is None

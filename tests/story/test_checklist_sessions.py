"""Statements 45 to 50, and 59: sessions, and a rolling update under load, of the real client with our workers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from comfyfleet import Serverless
from support.fleet_world import FleetWorld, a_graph, asked
from support.http_calls import post_json
from support.vastai import run_vastai

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetWorld]:
    # Refused addresses matter here, so nothing private is allowed; two workers with one session slot each.
    world = FleetWorld(
        tmp_path_factory.mktemp("fleet"), workers=2, COMFYFLEET_MAX_SESSIONS="1", COMFYFLEET_ALLOWED_PRIVATE_HOSTS=""
    )
    try:
        yield world.start()
    finally:
        world.close()


def payloads(*numbers: int) -> list[dict[str, Any]]:
    return [{"input": {"workflow_json": a_graph(number)}} for number in numbers]


def test_checklist_45_a_sessions_requests_go_to_one_worker(world: FleetWorld) -> None:
    answers, url = asked(
        world,
        """
        async with await endpoint.session(cost=100, lifetime=30) as session:
            answers = [await session.request("/generate/sync", payload) for payload in PAYLOADS]
            RESULT = [[[a["ok"], a["url"], a["request_idx"], a["response"]["status"]] for a in answers], session.url]
        """,
        PAYLOADS=payloads(1, 2, 3),
    )

    assert answers == [[True, url, 0, "completed"]] * 3


def test_checklist_46_a_closed_or_expired_session_is_of_no_more_use(world: FleetWorld) -> None:
    closed, expired = asked(
        world,
        """
session = await endpoint.session(cost=100, lifetime=30)
await session.close()
try:
    await session.request("/generate/sync", PAYLOADS[0])
    closed = "used"
except ValueError:
    closed = "ValueError"
session = await endpoint.session(cost=100, lifetime=0.2)
await asyncio.sleep(1)
try:
    await session.request("/generate/sync", PAYLOADS[1])
    expired = "used"
except ValueError:
    expired = "ValueError"
RESULT = [closed, expired]
        """,
        PAYLOADS=payloads(4, 5),
    )

    assert (closed, expired) == ("ValueError", "ValueError")


def test_checklist_47_when_a_workers_slots_are_taken_the_client_lands_on_another(world: FleetWorld) -> None:
    urls = asked(
        world,
        """
first = await endpoint.session(cost=100, lifetime=30)
second = await endpoint.session(cost=100, lifetime=30, timeout=60)
RESULT = [first.url, second.url]
await first.close()
await second.close()
        """,
    )

    assert len(set(urls)) == 2


def test_checklist_48_an_open_session_shows_the_auth_data_it_was_made_with(world: FleetWorld) -> None:
    is_open, stored, given = asked(
        world,
        """
session = await endpoint.session(cost=100, lifetime=30)
is_open = await session.is_open()
found = await endpoint.get_session(session.session_id, session.auth_data)
RESULT = [is_open, found.auth_data, session.auth_data]
await session.close()
        """,
    )

    assert is_open is True
    assert stored == given


def test_checklist_49_a_local_webhook_ends_a_session_at_the_side_port(world: FleetWorld) -> None:
    session_id, auth_data, url = asked(
        world,
        """
session = await endpoint.session(cost=100, lifetime=60)
RESULT = [session.session_id, session.auth_data, session.url]
        """,
    )
    host, _, port = url.rpartition(":")
    call = {"session_id": session_id, "session_auth": auth_data}

    status, body = post_json(f"{host}:{int(port) + 1}/session/end", call)
    again, _ = post_json(f"{host}:{int(port) + 1}/session/end", call)
    elsewhere, _ = post_json(f"{host}:{int(port) + 1}/generate/sync", call)

    assert (status, body) == (200, {"ended": True, "removed_session": session_id})
    assert (again, elsewhere) == (400, 404)


def test_checklist_50_a_session_needs_a_ticket_and_may_not_call_into_a_network(world: FleetWorld) -> None:
    routed = asked(world, 'RESULT = await endpoint.request("/generate/sync", PAYLOADS[0])', PAYLOADS=payloads(6))
    create = f"{routed['url']}/session/create"

    unsigned, body = post_json(create, {"auth_data": {"cost": 1}, "payload": {}, "session_id": None})
    bare, _ = post_json(create, {"payload": {}})
    refused = asked(
        world,
        """
RESULT = []
for target in ["http://127.0.0.1:9/x", "http://169.254.169.254/latest", "http://[::1]/", "/pyworker/update"]:
    try:
        session = await endpoint.session(cost=100, lifetime=5, on_close_route=target, on_close_payload={}, timeout=10)
        RESULT.append("opened")
        await session.close()
    except Exception as error:
        RESULT.append(type(error).__name__)
        """,
    )

    assert unsigned in (401, 422)
    assert bare == 401
    assert "error" in body
    assert "opened" not in refused


@pytest.mark.anyio
async def test_our_own_client_holds_sessions_streams_in_them_and_finds_the_other_slot(world: FleetWorld) -> None:
    async with Serverless(world.plane.key, url=world.plane.base) as client:
        endpoint = await client.get_endpoint("comfy")
        async with await endpoint.session(lifetime=60) as one, await endpoint.session(lifetime=60) as other:
            urls = {one.url, other.url}
            answer = await one.request("/generate/sync", payloads(80)[0])
            streamed = (await other.request("/generate/stream", payloads(81)[0], stream=True))["response"]
            events = [event["status"] async for event in streamed]
            both_open = await one.is_open(), await other.is_open()
        with pytest.raises(ValueError, match="closed"):
            await one.request("/generate/sync", payloads(82)[0])
        async with await endpoint.session(timeout=60) as freed:
            assert freed.url in urls

    assert len(urls) == 2
    assert (answer["ok"], answer["url"] in urls, events[-1]) == (True, True, "final_result")
    assert both_open == (True, True)


def lives(world: FleetWorld) -> dict[str, int]:
    """Worker id -> the pid of its present process."""
    found = {}
    for path in (world.plane.folder / "workers").glob("*/local.json"):
        try:
            found[path.parent.name] = json.loads(path.read_text())["pid"]
        except (OSError, ValueError):  # just being written
            continue
    return found


def test_checklist_59_during_a_rolling_update_of_busy_workers_no_request_fails(world: FleetWorld) -> None:
    group = world.plane.call("GET", "/api/v0/workergroups/")[1]["results"][0]["id"]
    before, stop = lives(world), world.folder / "stop-callers"
    answers: list[Any] = []
    callers = threading.Thread(
        target=lambda: answers.extend(
            asked(
                world,
                """
                import itertools, os
                numbers, RESULT = itertools.count(), []

                async def caller():
                    while not os.path.exists(STOP):
                        number, graph = next(numbers), json.loads(json.dumps(GRAPH))
                        name = graph["2"]["inputs"]["filename_prefix"] = f"rolling{number}"
                        graph["1"]["inputs"]["color"] = number
                        answer = await endpoint.request("/generate/sync", {"input": {"workflow_json": graph}})
                        RESULT.append([answer["ok"], answer["status"], answer["url"], name, answer["text"][:300]])

                await asyncio.gather(*(caller() for _ in range(4)))
                """,
                STOP=str(stop),
                GRAPH=a_graph(70, sleep_s=0.2),
            )
        )
    )
    callers.start()
    try:
        update = "RESULT = VastAI(KEY, server_url=BASE).update_workers(GROUP)"
        asked_for = run_vastai(update, base=world.plane.base, key=world.plane.key, GROUP=group)
        until = time.monotonic() + 120
        while len(before.items() & lives(world).items()) or len(lives(world)) < 2:
            assert time.monotonic() < until, world.plane.log[-3000:]
            time.sleep(0.2)
        world.until_ready()
    finally:
        stop.touch()
        callers.join(120)

    assert (asked_for["success"], asked_for["workers_to_update"]) == (True, 2)
    assert [answer for answer in answers if not answer[0]] == []
    assert len(answers) > 4
    made = [path.name for path in (world.plane.folder / "workers").glob("*/engine/output-*/rolling*.png")]
    assert len(made) == len(set(made)) == len(answers), "one render for each request"

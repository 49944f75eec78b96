"""Statements 8-24, 39 and 40 of the protocol's checklist: a real control plane, the real client, played workers."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import threading
import time
import urllib.request

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from support.control_plane import ControlPlane
from support.routing_calls import make_endpoint, played_workers, ready, request_through_client, route
from support.vastai import run_vastai

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    plane = ControlPlane(tmp_path_factory.mktemp("control")).start()
    yield plane
    plane.close()


@pytest.fixture
def endpoint(plane, request):
    """A fresh endpoint, named after the test, that nobody scales."""
    return make_endpoint(plane, request.node.name)


@pytest.fixture
def workers(plane):
    with played_workers(plane) as make:
        yield make


def test_checklist_08_a_ready_worker_is_answered_with_all_auth_fields_and_called_at_once(plane, endpoint, workers):
    worker = workers(endpoint)

    result = request_through_client(plane, endpoint)

    assert result["ok"] is True
    assert set(result["auth_data"]) >= {"cost", "endpoint", "reqnum", "request_idx", "signature", "url"}
    assert len(worker.calls) == 1
    # The client sleeps only before it polls again, and an answer with a url leaves nothing to poll for.
    ready(plane, endpoint)


def test_checklist_09_without_a_worker_the_answer_has_a_number_and_a_text_but_no_url(plane, endpoint):
    status, body = route(plane, endpoint)
    again_status, again = route(plane, endpoint, request_idx=body["request_idx"])

    assert (status, again_status) == (200, 200)
    assert "url" not in body
    assert isinstance(body["request_idx"], int)
    assert body["request_idx"] != 0
    assert isinstance(body["status"], str)
    assert again["request_idx"] == body["request_idx"]


def test_checklist_10_a_request_keeps_its_number_and_two_requests_never_share_one(plane, endpoint):
    _, one = route(plane, endpoint)
    _, other = route(plane, endpoint)
    polls = [route(plane, endpoint, request_idx=one["request_idx"])[1]["request_idx"] for _ in range(3)]

    assert set(polls) == {one["request_idx"]}
    assert one["request_idx"] != other["request_idx"]


def test_checklist_12_no_state_of_an_endpoint_makes_a_route_call_fail(plane, workers):
    for state in ("suspended", "stopped"):
        name = make_endpoint(plane, f"in state {state}")
        _, listing = plane.call("GET", "/api/v0/endptjobs/")
        found = next(item for item in listing["results"] if item["endpoint_name"] == name)
        plane.call("PUT", f"/api/v0/endptjobs/{found['id']}/", {"endpoint_state": state})

        status, body = route(plane, name)

        assert status == 200
        assert "url" not in body
    assert route(plane, "no such endpoint")[0] == 400
    assert plane.call("POST", "/route/", {"endpoint": name, "api_key": "wrong"}, key="")[0] == 401
    assert plane.call("POST", "/route/", {"cost": 1}, key="")[0] == 400


def test_checklist_12_neither_a_full_worker_nor_a_restart_under_a_request_is_an_error(
    plane, endpoint, workers, tmp_path
):
    workers(endpoint, score=0.1)  # one request is more than its 30 s: it is full after the first
    answers = [route(plane, endpoint) for _ in range(10)]
    nobody, polls = make_endpoint(plane, "restarted under a request"), tmp_path / "polls"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asking = pool.submit(
            run_vastai,
            """
            import pathlib
            async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
                endpoint = await client.get_endpoint(NAME)
                asked = client.queue_endpoint_request(endpoint, "/generate/sync", {"input": {}})
                while asked.status != "Polling":
                    await asyncio.sleep(0.01)
                pathlib.Path(POLLS).touch()
                RESULT = [await asked, sorted({call[3] for call in called("/route/")})]
            """,
            base=plane.base,
            key=plane.key,
            NAME=nobody,
            POLLS=str(polls),
        )
        while not polls.exists() and not asking.done():
            time.sleep(0.05)
        plane.stop()
        plane.start()
        workers(nobody)
        result, statuses = asking.result()

    assert {status for status, _ in answers} == {200}
    assert sum("url" in body for _, body in answers) == 1
    assert (result["ok"], statuses) == (True, [200])


def test_checklist_13_five_hundred_clients_at_once_get_each_route_answer_within_ten_seconds(
    plane, endpoint, workers, tmp_path
):
    processes, clients = 2, 250
    with concurrent.futures.ThreadPoolExecutor() as pool:
        crowds = [
            pool.submit(
                run_vastai,
                """
                import contextlib, pathlib, ssl
                from vastai.serverless.client.endpoint import Endpoint
                context = ssl.create_default_context()  # one for all: making one costs more than a request
                async with contextlib.AsyncExitStack() as stack:
                    made = [Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) for _ in range(CLIENTS)]
                    for client in made:
                        client._ssl_context = context
                        await stack.enter_async_context(client)
                    data = (await made[0].get_endpoint(NAME)).data
                    asked = [
                        client.queue_endpoint_request(Endpoint(client, data=data), "/generate/sync", {"input": {}})
                        for client in made
                    ]
                    while not all(one.status == "Polling" or one.done() for one in asked):
                        await asyncio.sleep(0.1)
                    pathlib.Path(POLLS).touch()
                    answers = await asyncio.gather(*asked, return_exceptions=True)
                routes = called("/route/")
                RESULT = {
                    "failed": [repr(one)[:200] for one in answers if not isinstance(one, dict) or not one["ok"]],
                    "statuses": sorted({call[3] for call in routes}),
                    "slowest_s": max(call[2] for call in routes),
                    "calls": len(routes),
                }
                """,
                base=plane.base,
                key=plane.key,
                NAME=endpoint,
                CLIENTS=clients,
                POLLS=str(tmp_path / f"polls{number}"),
            )
            for number in range(processes)
        ]
        while len(list(tmp_path.glob("polls*"))) < processes and not any(crowd.done() for crowd in crowds):
            time.sleep(0.1)
        workers(endpoint, score=1e9)
        told = [crowd.result() for crowd in crowds]

    for crowd in told:
        assert crowd["failed"] == []
        assert crowd["statuses"] == [200]
        assert crowd["slowest_s"] < 10.0
        assert crowd["calls"] >= 2 * clients


def test_checklist_14_a_finished_or_rejected_request_that_comes_back_is_routed_again(plane, endpoint, workers):
    worker = workers(endpoint)
    first = ready(plane, endpoint)
    worker.finish({"request_idx": first["request_idx"], "success": True, "status": "Success"})

    second = ready(plane, endpoint, request_idx=first["request_idx"])

    assert second["reqnum"] != first["reqnum"]
    assert second["request_idx"] == first["request_idx"]


def test_checklist_15_a_worker_nobody_reaches_is_left_out_and_the_loop_is_slowed_down(plane, endpoint, workers):
    dead = workers(endpoint)
    # Its reports still arrive (it is alive), but its address answers nobody.
    dead._server.shutdown()
    dead._server.server_close()

    answer = run_vastai(
        """
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            endpoint = await client.get_endpoint(NAME)
            try:
                await asyncio.wait_for(endpoint.request("/generate/sync", {"input": {}}), 5.0)
            except BaseException as error:
                RESULT = [type(error).__name__, len(called("/route/"))]
        """,
        base=plane.base,
        key=plane.key,
        NAME=endpoint,
    )
    first_again = ready(plane, endpoint)
    _, second = route(plane, endpoint, request_idx=first_again["request_idx"])

    assert answer[0] in ("TimeoutError", "CancelledError")
    assert 2 <= answer[1] < 20 * 5, "the throttle did not hold the client's loop"
    assert "url" not in second, "the same request was sent to the same dead worker"


def test_checklist_16_shares_follow_the_scores_within_ten_percent(plane, endpoint, workers):
    slow, fast = workers(endpoint, score=1000.0), workers(endpoint, score=3000.0)

    given: dict[str, float] = {slow.url: 0.0, fast.url: 0.0}
    for number in range(240):
        body = ready(plane, endpoint, cost=50 if number % 2 else 150)
        given[body["url"]] += body["cost"]

    share = given[fast.url] / sum(given.values())
    assert 0.75 * 0.9 < share < 0.75 * 1.1


def test_checklist_17_a_full_worker_gets_nothing_more_and_the_line_is_first_in_first_out(plane, workers):
    endpoint = make_endpoint(plane, "one full worker", max_queue_time=300.0)
    worker = workers(endpoint, score=1.0, reports=False)  # full above 300 load units: no job ends by itself in time
    worker.report()
    taken = [route(plane, endpoint)[1] for _ in range(8)]
    placed = [body for body in taken if "url" in body]
    waiting = [body for body in taken if "url" not in body]
    working = [body["request_idx"] for body in placed]
    worker.report(working_request_idxs=working, num_requests_working=len(working), cur_load=100.0 * len(working))
    worker.finish(*({"request_idx": body["request_idx"], "success": True, "status": "Success"} for body in placed[:1]))

    last_first = [route(plane, endpoint, request_idx=body["request_idx"])[1] for body in reversed(waiting)]

    assert 3 <= len(placed) <= 5
    assert waiting, "a full worker was given more"
    served = [body["request_idx"] for body in last_first if "url" in body]
    assert served == [waiting[0]["request_idx"]], "the one that waited longest goes first"


def test_checklist_18_a_request_nobody_polls_for_is_dropped_from_the_line(plane, endpoint, workers):
    _, gone = route(plane, endpoint, replay_timeout=1.0)
    _, kept = route(plane, endpoint)
    for _ in range(4):  # each poll is held for a moment: more than the first one's second goes by
        route(plane, endpoint, request_idx=kept["request_idx"])
    workers(endpoint, score=3.0)  # one job makes it full: 30 s of 3 load/s

    answer = ready(plane, endpoint, request_idx=kept["request_idx"])

    assert gone["request_idx"] < kept["request_idx"], "the dropped one stood before it"
    assert answer["request_idx"] == kept["request_idx"]


def test_checklist_19_old_bodies_work_and_what_we_add_comes_back_as_auth_data(plane, endpoint, workers):
    workers(endpoint)

    old = ready(plane, endpoint, some_unknown_key=[1, 2])
    result = request_through_client(plane, endpoint)

    assert old["request_idx"] > 0
    assert result["auth_data"]["ticket"].count(".") == 2
    assert "__request_id" in result["auth_data"]


def test_checklist_20_an_unknown_endpoint_is_a_400_whose_text_the_client_raises(plane):
    answer = run_vastai(
        """
        from vastai.serverless.client.endpoint import Endpoint
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            endpoint = Endpoint(client, "nobody knows it", 1, KEY)
            try:
                await endpoint.request("/generate/sync", {"input": {}})
            except RuntimeError as error:
                RESULT = str(error)
        """,
        base=plane.base,
        key=plane.key,
    )

    assert "nobody knows it" in answer


def public_key(plane):
    with urllib.request.urlopen(f"{plane.base}/pubkey/") as answer:
        pem = answer.read()
    return pem, serialization.load_pem_public_key(pem)


def test_checklist_21_the_public_key_is_pem_and_survives_a_restart(tmp_path):
    plane = ControlPlane(tmp_path / "own").start()
    try:
        before, key = public_key(plane)
        plane.kill()
        plane.start()
        after, _ = public_key(plane)
    finally:
        plane.close()

    assert before == after
    assert key.key_size == 2048


def test_checklist_22_the_signature_is_pkcs1_over_the_indented_json_of_the_url(plane, endpoint, workers):
    worker = workers(endpoint)
    body = ready(plane, endpoint)
    _, key = public_key(plane)

    message = json.dumps({"url": worker.url}, indent=4, sort_keys=True).encode()

    key.verify(base64.b64decode(body["signature"]), message, padding.PKCS1v15(), hashes.SHA256())
    assert message == b'{\n    "url": "' + worker.url.encode() + b'"\n}'


def test_checklist_24_the_url_is_byte_for_byte_what_the_worker_reported(plane, endpoint, workers):
    worker = workers(endpoint)

    assert ready(plane, endpoint)["url"] == worker.url
    assert not worker.url.endswith("/")


@pytest.mark.parametrize("status", [429, 503])
def test_checklist_39_a_worker_that_cannot_sends_the_retry_to_another_and_the_job_runs_once(
    plane, endpoint, workers, status
):
    executed = []
    lock = threading.Lock()

    def busy(call):
        return status, {}

    def able(call):
        with lock:
            executed.append(call)
        return 200, {"done": True}

    workers(endpoint, score=10.0, answer=busy)
    workers(endpoint, score=5.0, answer=able)

    result = request_through_client(plane, endpoint, timeout=40.0)

    assert result["ok"] is True
    assert result["response"] == {"done": True}
    assert len(executed) == 1


def test_checklist_40_a_worker_killed_in_mid_job_leaves_routing_and_the_job_ends_elsewhere(plane, endpoint, workers):
    in_job, other_side = threading.Event(), threading.Event()

    def hang(call):
        in_job.set()
        other_side.wait(60)
        return 200, {"who": "first"}

    first = workers(endpoint, score=10.0, answer=hang)
    workers(endpoint, score=5.0, answer=lambda call: (200, {"who": "second"}))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(request_through_client, plane, endpoint, timeout=60.0)
        assert in_job.wait(60)
        first.die()
        other_side.set()
        result = future.result()

    assert result["response"] == {"who": "second"}
    assert ready(plane, endpoint)["url"] != first.url


def test_a_key_over_its_rate_waits_in_the_real_client_and_is_told_why(plane, endpoint, workers):
    worker = workers(endpoint, score=100.0)
    body = {"name": "limited", "scopes": ["route", "read"], "limits": {"requests_per_s": 0.5, "burst": 1}}
    status, made = plane.call("POST", "/v1/keys", body)
    assert status == 200, made

    asked = urllib.request.Request(
        f"{plane.base}/route/",
        data=json.dumps({"endpoint": endpoint, "api_key": made["key"]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    answers = []
    for _ in range(2):
        with urllib.request.urlopen(asked, timeout=30) as answer:
            answers.append((answer.status, answer.headers["Retry-After"], json.load(answer)))
    result = request_through_client(plane, endpoint, timeout=60.0, key=made["key"])

    (_, _, first), (status, retry_after, second) = answers
    assert "url" in first
    assert status == 200
    assert "url" not in second
    assert "0.5 requests a second" in second["reason"]
    assert int(retry_after) >= 1
    assert result["ok"] is True, "the unmodified client waited for its turn"
    assert len(worker.calls) == 1

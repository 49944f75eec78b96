"""Durable jobs through real processes: control plane, worker, engine. What a caller is promised, promise by promise."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from support.fleet_world import FleetWorld, a_graph
from support.http_calls import post_json
from support.routing_calls import make_endpoint, ready

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = FleetWorld(tmp_path_factory.mktemp("fleet"))
    try:
        yield world.start()
    finally:
        world.close()


@pytest.fixture
def receiver():
    """A webhook receiver; `heard` has (headers, body) of each call."""
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.heard = heard
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_job_is_rendered_and_its_story_can_be_replayed(world):
    job_id = world.submit(1, metadata={"order": 7})
    job = world.until(job_id)

    assert (job["status"], job["attempts"], job["metadata"]) == ("completed", 1, {"order": 7})
    (output,) = job["result"]["output"]
    assert output["filename"].endswith(".png")
    assert output["url"].startswith(world.plane.base + "/files/")
    assert job["result"]["id"] == job_id

    events = world.events(job_id)
    kinds = [kind for _, kind, _ in events]
    assert kinds[:3] == ["queued", "leased", "running"]
    assert kinds[-1] == "completed"
    assert [seq for seq, _, _ in events] == list(range(1, len(events) + 1))
    assert events[-1][2]["result"]["output"] == job["result"]["output"]
    assert world.events(job_id, after=2) == events[2:]


def test_the_same_key_is_the_same_job_and_another_body_under_it_is_refused(world):
    body = {"endpoint": "comfy", "input": {"workflow_json": a_graph(2)}}
    headers = {"Idempotency-Key": "order-2"}
    first = world.plane.call("POST", "/v1/jobs", body, headers=headers)
    world.until(first[1]["id"])
    again = world.plane.call("POST", "/v1/jobs", body, headers=headers)
    other = world.plane.call("POST", "/v1/jobs", {**body, "input": {"workflow_json": a_graph(3)}}, headers=headers)

    assert (again[0], again[1]["id"], again[1]["status"]) == (202, first[1]["id"], "completed")
    assert (other[0], other[1]["error"]) == (422, "idempotency_mismatch")


def test_a_request_id_in_the_input_is_a_key_as_well(world):
    given = {"workflow_json": a_graph(4), "request_id": "song-4"}
    ids = [world.plane.call("POST", "/v1/jobs", {"endpoint": "comfy", "input": given})[1]["id"] for _ in range(2)]

    assert ids[0] == ids[1]


def test_one_name_at_two_endpoints_or_two_doors_never_brings_the_others_result(world):
    make_endpoint(world.plane, "elsewhere")
    given = {"workflow_json": a_graph(40), "request_id": "song-40"}
    _, first = world.plane.call("POST", "/v1/jobs", {"endpoint": "comfy", "input": given})
    status, refusal = world.plane.call("POST", "/v1/jobs", {"endpoint": "elsewhere", "input": given})
    assert (status, refusal["error"], refusal["details"]["id"]) == (422, "idempotency_mismatch", first["id"])
    durable = world.until(first["id"])["result"]

    ticket = ready(world.plane, "comfy")
    by_ticket = {"input": {"workflow_json": a_graph(41), "request_id": "song-40"}}
    body = {"auth_data": ticket, "session_id": None, "payload": by_ticket}
    status, routed = post_json(ticket["url"] + "/generate/sync", body)

    assert (status, routed["id"], durable["id"]) == (200, "song-40", first["id"])
    assert "/files/song-40/" in routed["output"][0]["url"]
    assert f"/files/{first['id']}/" in durable["output"][0]["url"]


def test_a_batch_is_accepted_whole_or_not_at_all(world):
    good = {"endpoint": "comfy", "input": {"workflow_json": a_graph(5)}}
    bad = {"endpoint": "comfy", "input": {"workflow_json": {"1": {"class_type": "X"}}}}
    before = len(world.plane.call("GET", "/v1/jobs?limit=500")[1]["jobs"])

    status, refused = world.plane.call("POST", "/v1/jobs/batch", {"jobs": [good, bad]})
    assert (status, refused["error"], refused["details"]["node_id"]) == (422, "workflow_refused", "1")
    assert len(world.plane.call("GET", "/v1/jobs?limit=500")[1]["jobs"]) == before

    status, accepted = world.plane.call("POST", "/v1/jobs/batch", {"jobs": [good] * 5})
    assert status == 202
    assert {world.until(job["id"])["status"] for job in accepted["jobs"]} == {"completed"}


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"endpoint": "nobody"}, 404, "endpoint"),
        ({"priority": 1000}, 400, "priority"),
        ({"cost": 0}, 400, "cost"),
        ({"deadline_s": -1}, 400, "deadline_s"),
        ({"input": {}}, 400, "input.workflow_json"),
        ({"input": {"workflow_json": []}}, 400, "input.workflow_json"),
        ({"input": {"workflow_json": a_graph(1), "request_id": "../x"}}, 400, "input.request_id"),
        ({"webhook": {"url": "file:///etc/passwd"}}, 422, "webhook.url"),
        ({"webhook": {"url": "http://169.254.169.254/"}}, 422, "webhook.url"),
        ({"input": 5}, 400, "input"),
    ],
)
def test_a_bad_submission_is_refused_naming_the_field(world, change, status, field):
    body = {"endpoint": "comfy", "input": {"workflow_json": a_graph(6)}, **change}
    answered, refusal = world.plane.call("POST", "/v1/jobs", body)

    assert answered == status
    assert refusal["msg"]
    assert refusal["details"]["field"] == field


BAD_INPUTS = {
    "nothing to do": {},
    "two things to do": {"modifier": "text2image", "workflow_json": a_graph(8)},
    "an id that is a path": {"request_id": "../x"},
    "an id that is too long": {"request_id": "x" * 129},
    "a number that is a word": {"deadline_s": "soon"},
    "a time before now": {"deadline_s": -1},
    "a wait before now": {"max_queue_wait_s": -1},
    "links that expired": {"expires_s": -5},
    "a flag that is none": {"force": "perhaps"},
    "a graph that is a list": {"workflow_json": []},
    "a graph without nodes": {"workflow_json": {}},
    "a canvas file": {"workflow_json": {"nodes": [], "links": []}},
    "a node without a class": {"workflow_json": {"1": {"inputs": {}}}},
    "a node without inputs": {"workflow_json": {"1": {"class_type": "SaveImage"}}},
    "a node that is a number": {"workflow_json": {"1": 5}},
    "too many nodes": {"workflow_json": {str(n): {"class_type": "X", "inputs": {}} for n in range(1501)}},
    "a graph that bites its tail": {
        "workflow_json": {
            "1": {"class_type": "X", "inputs": {"a": ["2", 0]}},
            "2": {"class_type": "X", "inputs": {"a": ["1", 0]}},
        }
    },
    "half the keys": {"s3": {"access_key_id": "a", "bucket_name": "b"}},
    "the other half of the keys": {"s3": {"secret_access_key": "a", "bucket_name": "b"}},
    "keys and no bucket": {"s3": {"access_key_id": "a", "secret_access_key": "b"}},
    "a bucket and no keys": {"s3": {"bucket_name": "b"}},
    "an endpoint and no keys": {"s3": {"endpoint_url": "https://s3.example.com", "bucket_name": "b"}},
    "an endpoint of no web": {
        "s3": {"access_key_id": "a", "secret_access_key": "b", "bucket_name": "c", "endpoint_url": "ftp://x"}
    },
    "an s3 that is a text": {"s3": "here"},
    "a number in s3 that is a word": {"s3": {"connect_attempts": "many"}},
    "a webhook to a file": {"webhook": {"url": "file:///etc/passwd"}},
    "a webhook to the cloud's secrets": {"webhook": {"url": "http://169.254.169.254/"}},
    "a webhook for other news": {"webhook": {"url": "https://example.com/", "events": ["weather"]}},
    "headers for nowhere": {"credentials": [{"headers": {"a": "b"}}]},
    "headers that are a text": {"credentials": "secret"},
}


@pytest.mark.parametrize("given", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_a_durable_job_is_refused_at_once_in_the_words_of_its_worker(world, given):
    wanted = {"workflow_json": a_graph(8), **given} if "modifier" not in given and given else given
    ticket = ready(world.plane, "comfy")
    at_worker = post_json(
        ticket["url"] + "/generate", {"auth_data": ticket, "session_id": None, "payload": {"input": wanted}}
    )
    job = {"endpoint": "comfy", "input": wanted}
    at_control = world.plane.call("POST", "/v1/jobs", job)
    in_a_batch = world.plane.call("POST", "/v1/jobs/batch", {"jobs": [job]})

    status, refusal = at_worker
    assert 400 <= status < 500, refusal
    assert refusal["error"]["details"].get("field") or refusal["error"]["details"].get("node_id")
    expected = (status, refusal["error"]["code"], refusal["error"]["details"])
    for answered, told in (at_control, in_a_batch):
        assert (answered, told["error"], told["details"]) == expected


def test_a_failing_workflow_fails_once_and_says_which_node(world):
    job = world.until(world.submit(7, fault="error"))

    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert job["error"]["details"]["node_id"] == "3"


def test_a_running_job_is_cancelled_at_its_worker_and_a_waiting_one_at_once(world):
    running = world.submit(8, gate="never")
    world.until(running, "running")
    waiting = world.submit(9)

    view = world.job(waiting)
    if view["status"] == "queued":
        assert view["waiting"]["reason"]
    world.plane.call("POST", f"/v1/jobs/{waiting}/cancel")
    world.plane.call("POST", f"/v1/jobs/{running}/cancel")

    assert world.until(waiting)["status"] == "cancelled"
    assert world.until(running)["status"] == "cancelled"  # its gate never opens
    assert world.until(world.submit(10))["status"] == "completed"


def test_a_deadline_that_passes_in_the_queue_fails_the_job_without_a_render(world):
    blocker = world.submit(11, gate="late", cost=1e9)
    world.until(blocker, "running")
    late = world.submit(12, deadline_s=0.5)

    job = world.until(late)
    world.open_gate("late")
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline_exceeded")
    assert job["attempts"] == 0
    assert world.until(blocker)["status"] == "completed"


def test_the_end_is_told_once_and_signed_and_no_secret_is_shown(world, receiver):
    url = f"http://127.0.0.1:{receiver.server_address[1]}/hook?token=abc"
    given = {
        "workflow_json": a_graph(13),
        "credentials": [{"url_prefix": "http://127.0.0.1:1/", "headers": {"X-Key": "sesame"}}],
        "expires_s": 1,
    }
    hook = {"url": url, "secret": "sesame", "extra_params": {"user": 1}}
    _, accepted = world.plane.call("POST", "/v1/jobs", {"endpoint": "comfy", "input": given, "webhook": hook})
    job_id = accepted["id"]
    (output,) = world.until(job_id)["result"]["output"]
    assert output["url_expires_at"] > time.time() + 30  # signed again for this reading
    with urllib.request.urlopen(output["url"], timeout=60) as file:
        assert file.read(4) == b"\x89PNG"
    until = time.monotonic() + 60
    while not receiver.heard and time.monotonic() < until:
        time.sleep(0.05)

    ((headers, body),) = receiver.heard
    told = json.loads(body)
    assert (told["id"], told["status"], told["extra"]) == (job_id, "completed", {"user": 1})
    expected = "sha256=" + hmac.new(b"sesame", body, hashlib.sha256).hexdigest()
    assert headers["X-Webhook-Signature"] == expected
    assert "sesame" not in json.dumps(world.job(job_id))
    for path in world.plane.folder.glob("control.sqlite3*"):
        raw = path.read_bytes()
        assert b"sesame" not in raw
        assert b"token=abc" not in raw
    assert "sesame" not in world.plane.log


def test_one_keys_jobs_are_invisible_to_another(world):
    _, mine = world.plane.call("POST", "/v1/keys", {"name": "mine", "scopes": ["jobs"]})
    _, other = world.plane.call("POST", "/v1/keys", {"name": "other", "scopes": ["jobs"]})
    job_id = world.submit(14, key=mine["key"])

    assert world.plane.call("GET", f"/v1/jobs/{job_id}", key=other["key"])[0] == 404
    assert world.plane.call("POST", f"/v1/jobs/{job_id}/cancel", key=other["key"])[0] == 404
    assert world.plane.call("GET", "/v1/jobs", key=other["key"])[1]["jobs"] == []
    assert [job["id"] for job in world.plane.call("GET", "/v1/jobs", key=mine["key"])[1]["jobs"]] == [job_id]
    assert world.plane.call("GET", "/api/v0/endptjobs/", key=mine["key"])[0] == 403
    world.until(job_id)


def test_a_key_over_its_rate_limit_is_told_when_to_come_back(world):
    limits = {"requests_per_s": 0.01, "burst": 2, "max_waiting_jobs": 0}
    _, made = world.plane.call("POST", "/v1/keys", {"name": "slow", "scopes": ["jobs"], "limits": limits})
    body = {"endpoint": "comfy", "input": {"workflow_json": a_graph(15)}}
    answers = [world.plane.call("POST", "/v1/jobs", body, key=made["key"]) for _ in range(4)]

    assert [status for status, _ in answers][:2] == [202, 202]
    assert answers[-1][0] == 429
    assert answers[-1][1]["error"] == "too_many_requests"


def test_checklist_56_both_clients_list_the_same_workers(world):
    from support.vastai import run_vastai

    managed, plain, unknown = run_vastai(
        """
        vast = VastAI(KEY, server_url=BASE)
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            endpoint = await client.get_endpoint("comfy")
            workers = [[w.id, w.status, w.measured_perf, w.cur_load] for w in await endpoint.get_workers()]
            endpoint._data = None
            from vastai.serverless.client.endpoint import Endpoint
            nobody = Endpoint(client, name="nobody", id=99999, api_key="x")
            RESULT = workers, vast.get_endpoint_workers(endpoint.id), await nobody.get_workers()
    """,
        base=world.plane.base,
        key=world.plane.key,
    )

    assert [row["id"] for row in plain] == [row[0] for row in managed]
    assert managed[0][1] == plain[0]["status"] == "idle"
    assert managed[0][2] == plain[0]["measured_perf"] > 0
    assert all(value is not None for row in plain for name, value in row.items())
    assert unknown == []


def test_what_was_used_is_on_the_ledger(world):
    world.until(world.submit(16))
    until = time.monotonic() + 90
    kinds: dict[str, float] = {}
    while kinds.get("gpu", 0) <= 1 or kinds.get("job", 0) <= 0:
        assert time.monotonic() < until, kinds
        time.sleep(0.5)
        kinds = {row["kind"]: row["seconds"] for row in world.plane.call("GET", "/v1/usage")[1]["usage"]}

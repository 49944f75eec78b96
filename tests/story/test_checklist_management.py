"""Statements 1-7 and 51-60 of the protocol's checklist: the real client manages our control plane, unmodified."""

from __future__ import annotations

import json
import ssl
import urllib.request

import pytest

from support.control_plane import ControlPlane
from support.vastai import run_vastai, run_vastai_command

pytestmark = pytest.mark.slow

COLUMN_A = {
    "cold_workers": 5,
    "max_workers": 20,
    "min_load": 0.0,
    "min_cold_load": 0.0,
    "target_util": 0.9,
    "cold_mult": 2.5,
    "max_queue_time": 30.0,
    "target_queue_time": 10.0,
    "inactivity_timeout": None,
    "endpoint_state": "active",
}


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    plane = ControlPlane(tmp_path_factory.mktemp("control")).start()
    yield plane
    plane.close()


@pytest.fixture
def run(plane):
    def run(snippet: str, **values):
        return run_vastai(snippet, base=plane.base, key=plane.key, **values)

    return run


def an_endpoint(plane, name: str, **fields) -> int:
    status, body = plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": name, "cold_workers": 0, **fields})
    assert status == 200, body
    return body["result"]


def a_template(plane) -> str:
    _, body = plane.call("POST", "/api/v0/template/", {"name": "mine", "image": "x", "env": "-e A=1"})
    return body["hash_id"]


def test_checklist_01_the_root_certificate_is_one_that_openssl_takes_without_a_key(plane):
    with urllib.request.urlopen(f"{plane.base}/static/jvastai_root.cer") as answer:
        pem = answer.read().decode()

    ssl.create_default_context().load_verify_locations(cadata=pem)
    assert answer.status == 200
    assert pem.count("BEGIN CERTIFICATE") == 1


def test_checklist_02_the_client_opens_without_the_outside_world(run):
    assert run("""
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            RESULT = client.is_open()
    """)


def test_checklist_03_the_key_is_taken_from_header_query_or_body_and_a_wrong_one_is_final(plane, run):
    for key, query, body in ((plane.key, "", None), ("", f"?api_key={plane.key}", None), ("", "", plane.key)):
        status, _ = plane.call(
            "GET", f"/api/v0/endptjobs/{query}", None if body is None else {"api_key": body}, key=key
        )
        assert status == 200
    assert plane.call("GET", "/api/v0/endptjobs/", key="wrong")[0] == 401

    refused, calls = run("""
        async with Serverless("wrong", autoscaler_url=BASE, webserver_url=BASE) as client:
            try:
                await client.get_endpoints()
            except Exception as error:
                RESULT = str(error), len(called('/api/v0/endptjobs/'))
    """)
    assert "HTTP 401" in refused
    assert calls == 1


def test_checklist_04_every_listed_endpoint_has_what_the_client_needs(plane, run):
    an_endpoint(plane, "four")

    _, body = plane.call("GET", "/api/v0/endptjobs/")
    assert body["success"] is True
    for item in body["results"]:
        assert {"id", "endpoint_name", "api_key", "user_id", "created_at"} <= item.keys()
    names = run("""
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            RESULT = [[e.name, e.id, bool(e.api_key)] for e in await client.get_endpoints()]
    """)
    assert ["four", next(i["id"] for i in body["results"] if i["endpoint_name"] == "four"), True] in names


def test_checklist_05_an_unknown_name_is_said_to_be_unknown(run):
    said = run("""
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            try:
                await client.get_endpoint("x")
            except Exception as error:
                RESULT = str(error)
    """)
    assert "Endpoint x could not be found" in said


def test_checklist_06_one_endpoint_by_id_for_the_managed_client(plane, run):
    endpoint_id = an_endpoint(plane, "six")

    status, body = plane.call("GET", f"/api/v0/endptjobs/{endpoint_id}/")
    assert (status, body["success"], body["result"]["endpoint_name"]) == (200, True, "six")

    timed_out = run(
        """
        from vastai.serverless.client.managed import ManagedEndpoint
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            managed = ManagedEndpoint(ID, client)
            try:
                await managed.request("/generate/sync", {"input": {}}, timeout=1.5)
            except Exception as error:
                RESULT = type(error).__name__, str(error)
    """,
        ID=endpoint_id,
    )
    # It found the endpoint, routed, and waited for a worker that nobody starts here: not a lookup failure.
    assert timed_out[0] == "TimeoutError"


def test_checklist_07_route_takes_the_endpoints_own_key_and_the_accounts(plane):
    an_endpoint(plane, "not seven")
    endpoint_id = an_endpoint(plane, "seven")
    own = plane.call("GET", f"/api/v0/endptjobs/{endpoint_id}/")[1]["result"]["api_key"]

    for key in (own, plane.key):
        status, body = plane.call("POST", f"/route/?api_key={key}", {"endpoint": "seven", "api_key": key}, key="")
        assert (status, "request_idx" in body) == (200, True)
    assert plane.call("POST", "/route/", {"endpoint": "not seven", "api_key": own}, key="")[0] == 400
    assert plane.call("POST", "/route/", {"endpoint": "seven", "api_key": own + "x"}, key="")[0] == 401


def test_checklist_51_missing_and_null_fields_get_the_defaults_of_the_clients_own_bodies(plane, run):
    made = run("""
        from vastai.data.endpoint import EndpointConfig
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            found = await client.create_endpoint(EndpointConfig(endpoint_name="t"))
            RESULT = getattr(found, "id", found)
    """)
    assert isinstance(made, int)
    result = plane.call("GET", f"/api/v0/endptjobs/{made}/")[1]["result"]
    assert {name: result[name] for name in COLUMN_A} == COLUMN_A

    nulls = dict.fromkeys(COLUMN_A)
    status, body = plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": "t null", **nulls})
    assert status == 200
    result = plane.call("GET", f"/api/v0/endptjobs/{body['result']}/")[1]["result"]
    assert {name: result[name] for name in COLUMN_A} == COLUMN_A


def test_checklist_52_the_management_class_does_everything_under_both_names(plane, run):
    template = a_template(plane)
    answers = run(
        """
        vast = VastAI(KEY, server_url=BASE)
        made = vast.create_endpoint(endpoint_name="fifty-two", cold_workers=0)
        eid = made["result"]
        changed = vast.update_endpoint(eid, max_workers=3)
        shown = [row for row in vast.show_endpoints() if row["id"] == eid]
        group = vast.create_workergroup(endpoint_id=eid, template_hash=TEMPLATE, search_params="gpu_ram>=24")
        vast.update_workergroup(group["id"], gpu_ram=8)
        groups = [row for row in vast.show_workergroups() if row["id"] == group["id"]]
        dropped_group = vast.delete_workergroup(group["id"])
        dropped = vast.delete_endpoint(eid)
        RESULT = [made, changed, shown, group, groups, dropped_group, dropped, vast.show_endpoints()]
    """,
        TEMPLATE=template,
    )
    made, changed, shown, group, groups, dropped_group, dropped, left = answers

    assert made["success"]
    assert changed["success"]
    assert [(row["endpoint_name"], row["max_workers"], row["cold_workers"]) for row in shown] == [("fifty-two", 3, 0)]
    assert isinstance(group["id"], int)
    # update_workergroup sends the default search string alone, as the real one does.
    assert groups[0]["search_query"] == {"verified": {"eq": True}, "rentable": {"eq": True}, "rented": {"eq": False}}
    assert groups[0]["gpu_ram"] == 8
    assert groups[0]["endpoint_name"] == "fifty-two"
    assert dropped_group["success"]
    assert dropped["success"]
    assert dropped["deleted_workers"] == []
    assert "fifty-two" not in [row["endpoint_name"] for row in left]
    for name in ("autojobs", "workergroups"):
        assert plane.call("GET", f"/api/v0/{name}/")[1]["success"]


def test_checklist_52_the_command_line_lists_and_creates(plane):
    arguments = ("create", "endpoint", "--endpoint_name", "by command line", "--cold_workers", "0")
    made = run_vastai_command(*arguments, base=plane.base, key=plane.key)
    assert made.returncode == 0, made.stdout + made.stderr
    shown = run_vastai_command("show", "endpoints", "--raw", base=plane.base, key=plane.key)
    assert "by command line" in [row["endpoint_name"] for row in json.loads(shown.stdout)]


def test_checklist_53_a_workergroup_by_template_hash_and_an_unknown_hash_is_a_400_with_msg(plane, run):
    endpoint_id = an_endpoint(plane, "fifty-three")
    made = run(
        """
        from vastai.serverless.client.managed import ManagedEndpoint
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            managed = ManagedEndpoint(ID, client)
            found = await managed.add_workergroup(TEMPLATE)
            RESULT = getattr(found, "id", found)
    """,
        ID=endpoint_id,
        TEMPLATE=a_template(plane),
    )
    assert isinstance(made, int)

    status, body = plane.call("POST", "/api/v0/workergroups/", {"endpoint_id": endpoint_id, "template_hash": "0" * 32})
    assert status == 400
    assert "0" * 32 in body["msg"]


def test_checklist_54_nulls_change_nothing_and_states_are_taken(plane):
    endpoint_id = an_endpoint(plane, "fifty-four", min_load=3.5, inactivity_timeout=60)
    before = plane.call("GET", f"/api/v0/endptjobs/{endpoint_id}/")[1]["result"]

    nulls = dict.fromkeys((*COLUMN_A, "endpoint_name"))
    assert plane.call("PUT", f"/api/v0/endptjobs/{endpoint_id}/", nulls)[0] == 200
    assert plane.call("GET", f"/api/v0/endptjobs/{endpoint_id}/")[1]["result"] == before
    for state in ("suspended", "stopped", "active"):
        plane.call("PUT", f"/api/v0/endptjobs/{endpoint_id}/", {"endpoint_state": state})
        result = plane.call("GET", f"/api/v0/endptjobs/{endpoint_id}/")[1]["result"]
        assert result == {**before, "endpoint_state": state}
    status, body = plane.call("PUT", f"/api/v0/endptjobs/{endpoint_id}/", {"endpoint_state": "asleep"})
    assert (status, body["error"]) == (400, "invalid_args")


def test_checklist_55_names_may_have_spaces_and_are_unique(plane):
    an_endpoint(plane, "my benchmark 2 of 3")
    status, body = plane.call("POST", "/api/v0/endptjobs/", {"endpoint_name": "my benchmark 2 of 3"})

    assert (status, body["success"], body["error"]) == (400, False, "invalid_args")
    assert "exists already" in body["msg"]


def test_checklist_58_logs_come_by_level_and_tail_is_honoured(plane, run):
    endpoint_id = an_endpoint(plane, "fifty-eight")
    for number in range(4):
        plane.call("PUT", f"/api/v0/endptjobs/{endpoint_id}/", {"max_workers": 10 + number})
    _, group = plane.call("POST", "/api/v0/workergroups/", {"endpoint_id": endpoint_id, "template_hash": "local"})

    endpoint, short, group_log = run(
        """
        vast = VastAI(KEY, server_url=BASE)
        RESULT = vast.get_endpt_logs(ID), vast.get_endpt_logs(ID, tail=2), vast.get_wrkgrp_logs(GROUP)
    """,
        ID=endpoint_id,
        GROUP=group["id"],
    )

    assert {"info0", "info1", "trace", "debug", "logs"} <= endpoint.keys()
    assert "max_workers: 12 -> 13" in endpoint["info0"]
    assert len(short["info0"].splitlines()) == 2
    assert "workergroup" in group_log["info0"]
    by_name = plane.call("POST", "/get_endpoint_logs/", {"endpoint": "fifty-eight", "tail": 1})[1]
    assert len(by_name["logs"].splitlines()) == 1


def test_checklist_59_a_rolling_update_is_asked_for_and_called_off(plane, run):
    endpoint_id = an_endpoint(plane, "fifty-nine")
    _, group = plane.call("POST", "/api/v0/workergroups/", {"endpoint_id": endpoint_id, "template_hash": "local"})
    asked, off, unknown = run(
        """
        vast = VastAI(KEY, server_url=BASE)
        try:
            vast.update_workers(99999)
            unknown = "accepted"
        except Exception as error:
            unknown = str(error)
        RESULT = vast.update_workers(GROUP), vast.update_workers(GROUP, cancel=True), unknown
    """,
        GROUP=group["id"],
    )

    assert (asked["success"], asked["workers_to_update"]) == (True, 0)
    assert (off["success"], off["cancelled"]) == (True, True)
    assert "404" in unknown

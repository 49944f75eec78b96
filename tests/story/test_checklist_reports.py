"""Statements 26-33 of the protocol's checklist: what workers say, to a real control plane. 29, 30 and 34 are timed: see
`tests/unit/control/test_desk.py`."""

from __future__ import annotations

import pytest

from support.control_plane import ControlPlane
from support.routing_calls import listed_state, make_endpoint, played_workers, ready, route

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


def test_checklist_26_full_and_partial_reports_are_taken_and_a_wrong_token_changes_nothing(plane, endpoint, workers):
    worker = workers(endpoint, reports=False)

    partial = worker.plane.call(
        "POST",
        "/worker_status/",
        {"id": worker.id, "mtoken": worker.mtoken, "error_msg": "", "version": "1.1.0"},
        key="",
    )[0]
    answers = [
        worker.plane.call("POST", "/worker_status/", {"id": worker.id, "mtoken": worker.mtoken, **life}, key="")[1]
        for life in ({}, {"incarnation": "i"})
    ]
    refused = worker.report(mtoken="wrong")
    state = listed_state(plane, endpoint, worker)

    assert partial == 200
    assert answers == [{"success": True}, {"success": True, "serve_for_s": 30.0}], "a lease is for who can be replaced"
    assert refused in (401, 403)
    assert state != "idle"
    assert worker.report() == 200


def test_checklist_27_a_report_moves_a_worker_from_loading_to_ready_to_error_at_once(plane, endpoint, workers):
    worker = workers(endpoint, reports=False)

    worker.report(loadtime=0.0, max_perf=0.0)
    loading = listed_state(plane, endpoint, worker)
    worker.report()
    idle = listed_state(plane, endpoint, worker)
    worker.report(error_msg="CUDA error: out of memory")
    broken = listed_state(plane, endpoint, worker)
    _, body = route(plane, endpoint)

    assert (loading, idle, broken) == ("model_loading", "idle", "error")
    assert "url" not in body


def test_checklist_28_a_loaded_worker_without_a_score_is_not_ready(plane, endpoint, workers):
    worker = workers(endpoint, reports=False)

    worker.report(max_perf=0.0)

    assert listed_state(plane, endpoint, worker) != "idle"
    assert "url" not in route(plane, endpoint)[1]


def test_checklist_31_negative_disk_usage_and_unknown_fields_are_taken(plane, endpoint, workers):
    worker = workers(endpoint, reports=False)

    assert worker.report(additional_disk_usage=-1.5, a_field_of_next_year={"x": 1}) == 200


def test_checklist_32_finished_requests_are_taken_in_both_forms_and_as_often_as_they_come(plane, endpoint, workers):
    worker = workers(endpoint, score=100.0, reports=False)
    worker.report()
    one, two = ready(plane, endpoint), ready(plane, endpoint)
    old_form = {"worker_id": worker.id, "mtoken": worker.mtoken, "request_idxs": [one["request_idx"]], "success": True}

    statuses = [plane.call("POST", "/delete_requests/", old_form, key="")[0] for _ in range(2)]
    statuses += [worker.finish({"request_idx": two["request_idx"], "success": True}, {"request_idx": 999_999_999})]
    _, rows = plane.call("GET", "/v1/workers")

    assert statuses == [200, 200, 200]
    assert next(row["reqs_working"] for row in rows["workers"] if row["id"] == worker.id) == 0


def test_checklist_33_a_rejected_request_is_routable_again_and_a_cancelled_one_frees_its_place(
    plane, endpoint, workers
):
    full, free = workers(endpoint, score=5.0), workers(endpoint, score=5.0)
    first = ready(plane, endpoint)
    by_url = {full.url: full, free.url: free}
    refusing = by_url.pop(first["url"])
    refusing.finish({"request_idx": first["request_idx"], "success": False, "status": "Rejected"})

    second = ready(plane, endpoint, request_idx=first["request_idx"])
    by_url[second["url"]].finish({"request_idx": second["request_idx"], "success": True, "status": "Cancelled"})
    _, rows = plane.call("GET", "/v1/workers")

    assert second["url"] in by_url, "the retry went back to the worker that refused it"
    assert sum(row["reqs_working"] for row in rows["workers"] if row["id"] in (full.id, free.id)) == 0

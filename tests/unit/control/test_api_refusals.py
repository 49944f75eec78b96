"""What the API refuses, by the field that is wrong; what is no number or no id never gets as far as the database."""

from __future__ import annotations

import json

import httpx
import pytest

from comfyfleet.control.app import build, open_control
from comfyfleet.settings.control import ControlSettings

pytestmark = pytest.mark.anyio

LONG = "9" * 5000
BEYOND_64_BITS = "9" * 23
GRAPH = {"1": {"class_type": "EmptyImage", "inputs": {}}}


class Api:
    """A whole control plane in this process, asked as its admin unless a key is named."""

    def __init__(self, client: httpx.AsyncClient, admin_key: str) -> None:
        self._client = client
        self._admin_key = admin_key

    async def __call__(self, method: str, path: str, body=None, *, key: str = "", **headers: str) -> tuple[int, dict]:
        headers = {"Authorization": f"Bearer {key or self._admin_key}", **headers}
        content = None if body is None else json.dumps(body)
        answer = await self._client.request(method, path, content=content, headers=headers)
        return answer.status_code, answer.json() if answer.headers["content-type"] == "application/json" else {}

    async def refusal(self, method: str, path: str, body=None, **asked: str) -> tuple[int, str | None]:
        """(status, the field that is named)."""
        status, answer = await self(method, path, body, **asked)
        return status, answer.get("details", {}).get("field")

    async def endpoint(self, name: str) -> int:
        return (await self("POST", "/api/v0/endptjobs/", {"endpoint_name": name, "cold_workers": 0}))[1]["result"]

    async def key(self, *scopes: str, endpoint_ids: tuple[int, ...] = ()) -> str:
        body = {"scopes": scopes, "endpoint_ids": endpoint_ids}
        return (await self("POST", "/v1/keys", body))[1]["key"]


@pytest.fixture
async def api(tmp_path):
    async with open_control(ControlSettings(data_dir=tmp_path)) as control:
        transport = httpx.ASGITransport(build(control), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://control") as client:
            yield Api(client, control.admin_key)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *((f"/v1/jobs?limit={text}", "limit") for text in ("²", LONG, "-1", "0", "501", "")),
        *((f"/v1/endpoints/1/decisions?limit={text}", "limit") for text in ("²", LONG)),
        *((f"/v1/endpoints/1/decisions?before_id={text}", "before_id") for text in ("²", LONG, BEYOND_64_BITS)),
        *((f"/v1/fleet/events?limit={text}", "limit") for text in ("²", LONG)),
        *((f"/v1/jobs?before={text}", "before") for text in ("1,%00", "nan,x", "inf,x", "1", "x,y", f"{LONG},x")),
        *((f"/v1/usage?{name}={text}", name) for name in ("since", "until") for text in ("nan", "-inf", "soon", LONG)),
    ],
)
async def test_what_is_no_number_or_no_place_is_refused_by_name(api, path, field):
    await api.endpoint("a")

    assert await api.refusal("GET", path) == (400, field)


async def test_a_page_begins_where_the_one_before_ended(api):
    await api.endpoint("a")
    body = {"jobs": [{"endpoint": "a", "input": {"workflow_json": GRAPH}}] * 3}
    assert (await api("POST", "/v1/jobs/batch", body))[0] == 202

    _, first = await api("GET", "/v1/jobs?limit=2")
    _, second = await api("GET", f"/v1/jobs?limit=2&before={first['next']}")

    assert len({job["id"] for job in first["jobs"] + second["jobs"]}) == 3


@pytest.mark.parametrize("last", [LONG, BEYOND_64_BITS, "-1", "x"])
async def test_a_stream_that_cannot_be_continued_is_refused_before_it_begins(api, last):
    await api.endpoint("a")
    _, job = await api("POST", "/v1/jobs", {"endpoint": "a", "input": {"workflow_json": GRAPH}})

    path = f"/v1/jobs/{job['id']}/events"
    assert await api.refusal("GET", path, **{"Last-Event-ID": last}) == (400, "Last-Event-ID")


@pytest.mark.parametrize("job_id", ["%00", "a%00b", "²", "x" * 65, "a b"])
async def test_a_job_whose_id_cannot_be_is_not_there(api, job_id):
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events")):
        assert (await api(method, f"/v1/jobs/{job_id}{path}"))[0] == 404


@pytest.mark.parametrize("number", [LONG, BEYOND_64_BITS, "²", "x"])
async def test_a_worker_whose_number_cannot_be_is_not_there(api, number):
    assert (await api("GET", f"/api/v0/instances/{number}/"))[0] == 404
    assert (await api("GET", f"/v1/workers/{number}/logs"))[0] == 404
    assert (await api("DELETE", f"/v1/workers/{number}"))[0] == 404
    assert (await api("POST", f"/api/v0/sign_cert/?instance_id={number}"))[0] == 400
    await api.endpoint("a")
    assert await api.refusal("POST", "/v1/workers", {"endpoint": "a", "id": 10**18}) == (400, "id")


async def test_a_field_that_is_missing_is_named(api):
    assert await api.refusal("POST", "/v1/jobs", {"input": {}}) == (400, "endpoint")
    assert await api.refusal("POST", "/v1/jobs", {"endpoint": "a", "input": 1}) == (400, "input")


# --- keys that are bound to endpoints --------------------------------------------------------------------------------


async def test_a_key_for_one_endpoint_is_refused_what_is_the_whole_accounts(api):
    own = await api.endpoint("own")
    await api("PUT", "/v1/env/X", {"value": "as it was", "is_secret": False})
    key = await api.key("manage", "read", endpoint_ids=(own,))

    for method, path, body in (
        ("GET", "/v1/env", None),
        ("PUT", "/v1/env/X", {"value": "given to everybody's workers"}),
        ("DELETE", "/v1/env/X", None),
        ("POST", "/api/v0/endptjobs/", {"endpoint_name": "b"}),
        ("GET", "/api/v0/template/", None),
        ("POST", "/api/v0/template/", {"name": "t"}),
        ("DELETE", "/api/v0/template/", {"hash_id": "local"}),
        ("POST", "/api/v0/bundles/", {}),
        ("PUT", "/api/v0/search/asks/", {}),
        ("POST", "/api/v0/sign_cert/?address=10.0.0.1", None),
        ("GET", "/v1/fleet/nodes", None),
        ("GET", "/v1/fleet/workers", None),
        ("GET", "/v1/fleet/events", None),
        ("GET", "/metrics", None),
    ):
        status, answer = await api(method, path, body, key=key)
        assert status == 403, path
        assert "for some endpoints only" in answer["msg"]
    assert (await api("GET", "/v1/env"))[1]["variables"][0]["value"] == "as it was"
    assert (await api("PUT", f"/api/v0/endptjobs/{own}/", {"max_workers": 3}, key=key))[0] == 200


async def test_a_key_for_one_endpoint_cannot_tell_another_from_none(api):
    own, _other = await api.endpoint("own"), await api.endpoint("other")
    key = await api.key("manage", "read", "jobs", endpoint_ids=(own,))

    for method, path, body in (
        ("GET", "/v1/jobs?endpoint={name}", None),
        ("GET", "/api/v0/endptjobs/{id}/", None),
        ("PUT", "/api/v0/endptjobs/{id}/", "{}"),
        ("DELETE", "/api/v0/endptjobs/{id}/", None),
        ("GET", "/v1/endpoints/{id}/decisions", None),
        ("POST", "/v1/workers", '{"endpoint": "{name}"}'),
    ):
        asked = []
        for name, endpoint_id in (("other", "2"), ("never", "9")):
            filled, sent = (text and text.replace("{name}", name).replace("{id}", endpoint_id) for text in (path, body))
            status, answer = await api(method, filled, sent and json.loads(sent), key=key)
            asked.append((status, answer["error"], answer["msg"].replace(name, "it")))
        assert asked[0] == asked[1]
        assert asked[0][0] == 404, path
    assert (await api("GET", "/v1/jobs?endpoint=own", key=key))[0] == 200


async def test_a_key_that_is_not_what_was_meant_is_not_made(api):
    own = await api.endpoint("own")
    gone = await api.endpoint("gone")
    await api("DELETE", f"/api/v0/endptjobs/{gone}/")

    for body, field in (
        ({"scopes": ["admin"], "endpoint_ids": [own]}, "endpoint_ids"),
        ({"endpoint_ids": [own, 99]}, "endpoint_ids"),
        ({"endpoint_ids": [gone]}, "endpoint_ids"),
        ({"limits": {"requsts_per_s": 1}}, "limits.requsts_per_s"),
        ({"limits": {"requests_per_s": -1}}, "limits.requests_per_s"),
        ({"limits": {"burst": -0.5}}, "limits.burst"),
        ({"limits": {"max_waiting_jobs": -1}}, "limits.max_waiting_jobs"),
        ({"limits": {"gpu_seconds_per_day": -1}}, "limits.gpu_seconds_per_day"),
        ({"limits": {"weight": 0}}, "limits.weight"),
        ({"limits": {"weight": 1e300}}, "limits.weight"),
    ):
        assert await api.refusal("POST", "/v1/keys", body) == (400, field), body
    assert (await api("GET", "/v1/keys"))[1]["keys"] == []
    assert (await api("POST", "/v1/keys", {"endpoint_ids": [own], "limits": {"weight": 0.5}}))[0] == 200


# --- the account's variables -----------------------------------------------------------------------------------------


async def test_a_variable_is_measured_as_a_process_is_given_it(api):
    assert (await api("PUT", "/v1/env/FITS", {"value": "x" * 65_536}))[0] == 200
    status, answer = await api("PUT", "/v1/env/EMOJI", {"value": "😀" * 40_000})

    assert (status, answer["details"]["field"]) == (400, "value")
    assert "EMOJI has 160000 bytes" in answer["msg"]


async def test_all_variables_together_fit_into_a_process(api):
    statuses = [(await api("PUT", f"/v1/env/V{number}", {"value": "x" * 65_536}))[0] for number in range(15)]
    status, answer = await api("PUT", "/v1/env/LAST", {"value": "x" * 65_536})

    assert set(statuses) == {200}
    assert (status, answer["details"]["field"]) == (400, "value")
    assert "with LAST" in answer["msg"]
    assert (await api("PUT", "/v1/env/V0", {"value": "smaller"}))[0] == 200
    assert (await api("PUT", "/v1/env/LAST", {"value": "x" * 65_000}))[0] == 200

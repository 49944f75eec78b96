"""What is refused of a request before anything looks at an engine. Every refusal names its field."""

from __future__ import annotations

import pytest

from comfyfleet.wire.errors import BadRequest, Unprocessable
from comfyfleet.wire.generation import GenerateInput, S3Target, UrlCredential
from comfyfleet.wire.requests import check_request, check_s3, parse_payload

GRAPH = {"1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}}}


@pytest.mark.parametrize("request_id", ["../x", "a/b", "", ".hidden", "x" * 129, "a b", "ä"])
def test_an_id_that_is_no_plain_name_is_refused(request_id):
    request = GenerateInput(request_id=request_id, workflow_json=GRAPH)
    if request_id == "":
        check_request(request)
    else:
        with pytest.raises(BadRequest):
            check_request(request)


@pytest.mark.parametrize(
    "request_",
    [
        GenerateInput(),
        GenerateInput(workflow_json=""),
        GenerateInput(workflow_json=GRAPH, modifier="Text2Image"),
    ],
)
def test_there_must_be_exactly_one_kind_of_work(request_):
    with pytest.raises(BadRequest):
        check_request(request_)


@pytest.mark.parametrize("headers", [{"a": "secret\r\nX: b"}, {"": "secret"}, {"Host": "secret"}, {"Range": "secret"}])
def test_headers_that_no_fetch_may_carry_are_refused_by_field_and_untold(headers):
    good = UrlCredential(url_prefix="https://a.test/", headers={"Authorization": "Bearer ü"})
    bad = UrlCredential(url_prefix="https://a.test/", headers=headers)
    with pytest.raises(BadRequest) as refusal:
        check_request(GenerateInput(workflow_json=GRAPH, credentials=(good, bad)))

    assert refusal.value.details["field"] == "input.credentials[1].headers"
    assert "secret" not in str(refusal.value.as_dict())


@pytest.mark.parametrize("given", [{"expires_s": 1e300}, {"s3": {"expires_s": 4e7}}])
def test_a_link_that_would_keep_a_file_for_ever_is_refused(given):
    with pytest.raises(BadRequest, match="a year"):
        check_request(parse_payload({"input": {"workflow_json": GRAPH, **given}}))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("bucket_name", "../other"),
        ("bucket_name", "a?policy"),
        ("bucket_name", "a b"),
        ("region", "x\r\ny"),
        ("access_key_id", "a\r\nb"),
        ("secret_access_key", "a\0b"),
    ],
)
def test_what_cannot_stand_in_a_url_or_a_signature_is_refused_by_field_and_untold(field, text):
    target = S3Target(**{"access_key_id": "a", "secret_access_key": "b", "bucket_name": "c", field: text})
    with pytest.raises(Unprocessable) as refusal:
        check_s3(target, has_keys=False, has_bucket=False)

    assert refusal.value.details["field"] == f"input.s3.{field}"
    assert text not in str(refusal.value.as_dict())


def test_blanks_are_not_given_and_what_is_the_callers_own_keeps_them():
    given = {"workflow_json": GRAPH, "s3": {"expires_s": "", "region": None}, "webhook": {"extra_params": {"a": ""}}}

    request = parse_payload({"input": {**given, "deadline_s": "", "modifications": {"text": ""}}})

    assert (request.s3.expires_s, request.s3.region, request.deadline_s) == (0.0, "", 0.0)
    assert request.webhook.extra_params == {"a": ""}
    assert request.modifications == {"text": ""}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"s3": {"expires_s": "soon"}}, "input.s3.expires_s"),
        ({"credentials": [{}]}, "input.credentials[0]"),
        ({"webhook": {"events": "all"}}, "input.webhook.events"),
        ({"force": 7}, "input.force"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_name(given, field):
    with pytest.raises(BadRequest) as refused:
        parse_payload({"input": {"workflow_json": GRAPH, **given}})

    assert refused.value.details["field"] == field

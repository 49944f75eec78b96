"""The documents' variables keep their names and meaning; an empty one is one not given; secrets do not show."""

from __future__ import annotations

import pytest

from comfyfleet.settings.outreach import FetchSettings, WebhookSettings
from comfyfleet.settings.storage import S3Settings, StorageSettings
from comfyfleet.wire.errors import Unprocessable
from comfyfleet.wire.generation import S3Target
from comfyfleet.worker.stages.destinations import effective_s3

S3 = {"S3_ACCESS_KEY_ID": "ak", "S3_SECRET_ACCESS_KEY": "sk", "S3_BUCKET_NAME": "b"}


def test_s3_comes_from_the_documents_variables() -> None:
    env = {
        **S3,
        "S3_ENDPOINT_URL": "https://s3.test",
        "S3_REGION": "eu",
        "S3_CONNECT_TIMEOUT": "5",
        "S3_CONNECT_ATTEMPTS": "7",
    }

    s3 = StorageSettings.from_environment(env).s3

    assert s3 is not None
    assert (s3.bucket, s3.access_key_id, s3.secret_access_key) == ("b", "ak", "sk")
    assert (s3.endpoint_url, s3.region, s3.connect_timeout_s, s3.attempts) == ("https://s3.test", "eu", 5.0, 7)
    assert "sk" not in repr(s3)


@pytest.mark.parametrize("missing", S3)
def test_without_bucket_or_key_files_stay_here_and_the_operator_is_told_which_is_missing(missing: str) -> None:
    settings = StorageSettings.from_environment({**S3, missing: ""})

    assert effective_s3(settings.s3, S3Target()) is None
    assert missing in settings.notice
    assert "sk" not in settings.notice


@pytest.mark.parametrize("env", [{}, S3])
def test_nothing_is_said_where_s3_is_set_or_not_meant(env: dict[str, str]) -> None:
    assert StorageSettings.from_environment(env).notice == ""


def test_a_request_may_bring_what_the_operator_left_open() -> None:
    keys_only = StorageSettings.from_environment({**S3, "S3_BUCKET_NAME": ""}).s3
    bucket_only = StorageSettings.from_environment({"S3_BUCKET_NAME": "b", "S3_ENDPOINT_URL": "https://ours"}).s3

    with_bucket = effective_s3(keys_only, S3Target(bucket_name="mine"))
    with_keys = effective_s3(bucket_only, S3Target(access_key_id="a", secret_access_key="c"))

    assert with_bucket is not None
    assert (with_bucket.bucket, with_bucket.access_key_id) == ("mine", "ak")
    assert with_keys is not None
    assert (with_keys.bucket, with_keys.endpoint_url, with_keys.access_key_id) == ("b", "https://ours", "a")


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_number_that_is_none_names_its_variable(value: str) -> None:
    with pytest.raises(ValueError, match="S3_CONNECT_TIMEOUT"):
        StorageSettings.from_environment({**S3, "S3_CONNECT_TIMEOUT": value})


def test_webhook_secrets_may_be_several_while_they_rotate() -> None:
    settings = WebhookSettings.from_environment({"WEBHOOK_URL": "https://h", "WEBHOOK_SECRET": "whsec_new whsec_old"})

    assert settings.secrets == ("whsec_new", "whsec_old")
    assert "whsec" not in repr(settings)


def test_allowed_hosts_are_a_list() -> None:
    settings = FetchSettings.from_environment({"COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "minio.lan, 10.0.0.0/8 ,"})

    assert settings.allowed_private_hosts == ("minio.lan", "10.0.0.0/8")


OPERATOR = S3Settings(
    bucket="ours", access_key_id="ak", secret_access_key="sk", endpoint_url="https://ours", region="eu"
)


def test_a_request_overrides_field_by_field() -> None:
    assert effective_s3(OPERATOR, S3Target()) == OPERATOR
    chosen = effective_s3(OPERATOR, S3Target(bucket_name="mine", region="us"))
    assert chosen is not None
    assert (chosen.bucket, chosen.region, chosen.access_key_id) == ("mine", "us", "ak")


def test_a_request_may_say_how_long_to_try_within_bounds() -> None:
    chosen = effective_s3(OPERATOR, S3Target(connect_timeout=5, connect_attempts=1000))

    assert chosen is not None
    assert (chosen.connect_timeout_s, chosen.attempts) == (5, 10)


def test_a_request_with_everything_needs_no_operator() -> None:
    target = S3Target(access_key_id="a", secret_access_key="b", endpoint_url="https://x", bucket_name="c")

    chosen = effective_s3(None, target)

    assert chosen is not None
    assert (chosen.bucket, chosen.endpoint_url, chosen.secret_access_key) == ("c", "https://x", "b")
    assert effective_s3(None, S3Target()) is None


@pytest.mark.parametrize(
    ("target", "field"),
    [
        (S3Target(endpoint_url="https://evil"), "input.s3.endpoint_url"),
        (S3Target(access_key_id="a"), "input.s3.secret_access_key"),
        (S3Target(secret_access_key="a", endpoint_url="https://x"), "input.s3.access_key_id"),
    ],
)
def test_the_operators_keys_never_sign_for_a_strangers_endpoint(target: S3Target, field: str) -> None:
    with pytest.raises(Unprocessable) as refusal:
        effective_s3(OPERATOR, target)

    assert refusal.value.details["field"] == field


def test_a_bucket_that_nobody_has_keys_for_is_refused() -> None:
    for operator in (None, S3Settings(bucket="ours")):
        with pytest.raises(Unprocessable) as refusal:
            effective_s3(operator, S3Target(bucket_name="mine"))
        assert refusal.value.details["field"] == "input.s3.access_key_id"


def test_keys_without_any_bucket_are_refused() -> None:
    with pytest.raises(Unprocessable, match="bucket_name"):
        effective_s3(None, S3Target(access_key_id="a", secret_access_key="b"))

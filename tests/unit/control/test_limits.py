"""Token bucket, waiting jobs, GPU-seconds: refused with the true time to wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.control.auth import Principal
from comfyfleet.control.limits import DAY_S, Limits, take
from comfyfleet.control.records import KeyLimits
from comfyfleet.wire.errors import TooManyRequests


def a_key(**limits) -> Principal:
    return Principal(scope="key:1", scopes=frozenset({"jobs"}), limits=KeyLimits(**limits))


def test_a_bucket_fills_at_its_rate_and_says_when():
    bucket, wait_s = take(None, 0.0, 4, rate=2.0, burst=4.0)
    assert wait_s == 0
    bucket, wait_s = take(bucket, 0.0, 1, rate=2.0, burst=4.0)
    assert wait_s == pytest.approx(0.5)
    _, wait_s = take(bucket, 0.5, 1, rate=2.0, burst=4.0)
    assert wait_s == 0


@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=200),
    rate=st.floats(0.5, 20),
    burst=st.floats(1, 50),
)
def test_a_bucket_never_lets_more_through_than_rate_and_burst_allow(gaps, rate, burst):
    bucket, now, passed = None, 0.0, 0
    for gap in gaps:
        now += gap
        bucket, wait_s = take(bucket, now, 1, rate=rate, burst=burst)
        passed += wait_s == 0
        assert passed <= now * rate + max(burst, rate, 1.0) + 1e-6


def test_waiting_for_as_long_as_was_said_is_enough():
    limits, key = Limits(), a_key(requests_per_s=1.0, burst=1.0)
    limits.admit(key, 1, 0.0)

    with pytest.raises(TooManyRequests) as refused:
        limits.admit(key, 1, 0.25)
    limits.admit(key, 1, 0.25 + refused.value.retry_after_s)


def test_a_key_without_limits_is_never_refused():
    limits = Limits()
    for _ in range(1000):
        limits.admit(a_key(), 1, 0.0)
    limits.admit_waiting(a_key(), 10**6, 1)
    limits.admit_seconds(a_key(), 0.0)


def test_a_days_gpu_seconds_come_back_after_a_day():
    limits, key = Limits(), a_key(gpu_seconds_per_day=100.0)
    limits.used_seconds(key.scope, 60.0, 0.0)
    limits.admit_seconds(key, 10.0)
    limits.used_seconds(key.scope, 60.0, 20.0)

    with pytest.raises(TooManyRequests) as refused:
        limits.admit_seconds(key, 30.0)
    assert refused.value.retry_after_s == pytest.approx(DAY_S - 30.0)
    limits.admit_seconds(key, DAY_S + 1.0)


def test_too_many_waiting_jobs_are_refused_whole():
    with pytest.raises(TooManyRequests):
        Limits().admit_waiting(a_key(max_waiting_jobs=10), 8, 3)
    Limits().admit_waiting(a_key(max_waiting_jobs=10), 8, 2)


def test_accepted_jobs_count_by_what_they_are_thought_to_take():
    limits, key = Limits(), a_key(gpu_seconds_per_day=100.0)
    limits.promised = lambda _scope: 70.0
    limits.admit_seconds(key, 0.0, seconds=30.0)

    with pytest.raises(TooManyRequests, match="40") as refused:
        limits.admit_seconds(key, 0.0, seconds=40.0)

    assert refused.value.retry_after_s > 0
    assert limits.quota_wait_s(key.scope, 100.0, 0.0) == 0
    limits.used_seconds(key.scope, 30.0, 0.0)
    assert limits.quota_wait_s(key.scope, 100.0, 10.0) == pytest.approx(DAY_S - 10.0)


def test_one_job_that_is_longer_than_a_whole_quota_goes_alone_and_a_batch_does_not():
    limits, key = Limits(), a_key(gpu_seconds_per_day=10.0)
    limits.admit_seconds(key, 0.0, seconds=100.0)
    with pytest.raises(TooManyRequests):
        limits.admit_seconds(key, 0.0, count=2, seconds=20.0)
    limits.used_seconds(key.scope, 1.0, 0.0)
    with pytest.raises(TooManyRequests):
        limits.admit_seconds(key, 0.0, seconds=100.0)


def test_what_is_being_stored_counts_for_whoever_comes_meanwhile():
    limits, key = Limits(), a_key(gpu_seconds_per_day=100.0, max_waiting_jobs=3)
    with limits.arriving(key.scope, 2, 60.0), limits.arriving(key.scope, 1, 30.0):
        with pytest.raises(TooManyRequests):
            limits.admit_waiting(key, 0, 1)
        with pytest.raises(TooManyRequests):
            limits.admit_seconds(key, 0.0, seconds=20.0)
    limits.admit_waiting(key, 0, 3)
    limits.admit_seconds(key, 0.0, seconds=100.0)

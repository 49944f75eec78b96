"""What the client does after one attempt: every case a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.client.attempts import DEFAULT_MAX_RETRIES, Attempt, next_step


def after(
    status: int | None, *, repeats: int = 0, retry: bool = True, limit: int | None = None, wait: float | None = None
):
    return next_step(
        Attempt(status=status, retry_after_s=wait),
        repeats_done=repeats,
        retry=retry,
        max_retries=limit,
        max_wait_s=5.0,
        jitter=1.0,
    )


@pytest.mark.parametrize("status", [200, 201, 400, 401, 404, 409, 413, 422, 499])
def test_an_answer_that_no_repeat_can_change_is_handed_over_at_once(status: int) -> None:
    assert after(status).action == "finish"


@pytest.mark.parametrize("status", [None, 408, 429, 500, 502, 503, 507])
def test_what_a_repeat_can_help_is_repeated_but_not_when_the_caller_forbids_it(status: int | None) -> None:
    assert after(status).action == "repeat"
    assert after(status, retry=False).action == "finish"
    assert after(status, limit=2, repeats=2).action == "finish"


def test_a_dead_worker_is_given_up_after_a_few_tries_and_a_full_one_is_waited_for() -> None:
    assert after(None, repeats=DEFAULT_MAX_RETRIES).action == "finish"
    assert after(503, repeats=1000).action == "repeat"


def test_a_server_that_says_when_is_believed_within_reason() -> None:
    assert after(503, wait=7.0).wait_s == 7.0
    assert after(503, wait=1e9).wait_s == 60.0


@given(repeats=st.integers(0, 10_000), jitter=st.floats(0, 1))
def test_waits_grow_and_never_pass_the_cap(repeats: int, jitter: float) -> None:
    step = next_step(
        Attempt(status=503), repeats_done=repeats, retry=True, max_retries=None, max_wait_s=5.0, jitter=jitter
    )

    assert 0.1 <= step.wait_s <= 5.0

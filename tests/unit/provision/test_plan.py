"""What is left to do for a template, decided from values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.provision.plan import Found, Plan, Step, Verb, check_room, decide
from comfyfleet.provision.template import ModelFile
from comfyfleet.wire.errors import DiskFull


def a_model(size_bytes: int | None = 1000, name: str = "a.safetensors") -> ModelFile:
    return ModelFile(url="https://example.com/a", folder="vae", name=name, size_bytes=size_bytes)


def test_an_absent_file_is_downloaded_in_full():
    assert decide(a_model(), Found()) == Step(model=a_model(), verb=Verb.DOWNLOAD, fetch_bytes=1000)


def test_a_begun_file_is_resumed_for_the_rest():
    step = decide(a_model(), Found(staged_bytes=400))

    assert (step.verb, step.fetch_bytes) == (Verb.RESUME, 600)


def test_a_whole_file_stays():
    assert decide(a_model(), Found(size_bytes=1000, has_header=True)).verb is Verb.KEEP


def test_a_cut_off_file_is_replaced():
    step = decide(a_model(name="a.ckpt"), Found(size_bytes=300))

    assert step.verb is Verb.REPLACE
    assert "300 of 1000" in step.note


def test_a_broken_file_is_replaced_and_the_reason_said():
    assert decide(a_model(), Found(size_bytes=1000, problem="no header")).note == "no header"


def test_a_users_own_whole_file_of_another_size_is_never_replaced():
    step = decide(a_model(), Found(size_bytes=300, has_header=True))

    assert step.verb is Verb.KEEP
    assert "300" in step.note


@given(st.one_of(st.none(), st.integers(1, 10**12)), st.integers(0, 10**12))
def test_what_is_staged_plus_what_is_fetched_is_the_file(size_bytes, staged):
    staged = min(staged, size_bytes or 0)
    step = decide(a_model(size_bytes), Found(staged_bytes=staged))

    assert step.fetch_bytes is None if size_bytes is None else step.fetch_bytes + staged == size_bytes


def test_the_plan_is_printed_in_steps_and_bytes():
    plan = Plan(steps=(decide(a_model(2_500_000_000), Found()), decide(a_model(None, "b.ckpt"), Found())))

    assert plan.lines() == [
        "download vae/a.safetensors  2.50 GB",
        "download vae/b.ckpt  size unknown",
        "2 of 2 files to fetch, 2.50 GB (2500000000 bytes) and 1 of unknown size",
    ]


def test_a_plan_that_does_not_fit_is_refused_with_figures(tmp_path):
    with pytest.raises(DiskFull) as refused:
        check_room([decide(a_model(10**18), Found())], tmp_path / "not" / "there", reserve_bytes=5)

    assert refused.value.details["needed_bytes"] == 10**18
    assert 0 < refused.value.details["free_bytes"] < 10**18

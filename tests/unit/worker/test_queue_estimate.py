"""Positions, estimates and how far ahead engines are fed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.wire.generation import GenerateInput
from comfyfleet.worker.engines.pool import AHEAD_S, MAX_BOUND, has_room
from comfyfleet.worker.job import Job
from comfyfleet.worker.queue import WaitingLine, estimate


def a_job(name="job", shape="", accepted_at=0.0):
    return Job(
        id=name,
        scope="",
        key=name,
        folder=name,
        request=GenerateInput(),
        fingerprint="",
        accepted_at=accepted_at,
        prompt_id=name,
        shape=shape,
    )


def view(jobs, *, engines=(0.0,), seconds=10.0, job=None):
    return estimate(jobs, jobs, engines=engines, predicted_s=lambda one: seconds, job=job, limit=100)


def test_the_third_in_line_waits_for_the_running_one_and_two_more():
    jobs = [a_job(str(n)) for n in range(3)]

    found = view(jobs, engines=[4.0], job=jobs[2])

    assert (found.position, found.eta_s) == (3, 34.0)
    assert found.next_place_s == 4.0


def test_two_engines_share_the_line():
    jobs = [a_job(str(n)) for n in range(4)]

    assert view(jobs, engines=[0.0, 0.0], job=jobs[3]).eta_s == 20.0


def test_nothing_measured_means_no_estimate():
    jobs = [a_job()]

    assert view(jobs, seconds=None, job=jobs[0]).eta_s is None


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=4), st.integers(1, 30))
def test_a_later_place_never_waits_less(engines, count):
    jobs = [a_job(str(n)) for n in range(count)]

    etas = [view(jobs, engines=engines, job=job).eta_s for job in jobs]

    assert etas == sorted(etas)


def test_the_line_starts_a_few_ahead_in_order_and_gives_back_only_what_has_not_begun():
    line = WaitingLine()
    jobs = [a_job(str(n)) for n in range(4)]
    for job in jobs:
        line.add(job)

    assert [line.next_to_start(2), line.next_to_start(2), line.next_to_start(2)] == [jobs[0], jobs[1], None]
    assert line.take(jobs[3])
    assert not line.take(jobs[0])
    line.remove(jobs[0])
    assert line.next_to_start(2) is jobs[2]


def test_an_engine_always_gets_one_prompt_ahead_and_more_only_of_short_ones():
    assert has_room([], bound=0)
    assert has_room([], bound=1)
    assert not has_room([600.0], bound=2)
    assert has_room([0.004], bound=2)


@given(st.lists(st.floats(0, 10), max_size=20))
def test_never_more_than_the_bound_and_never_much_work_ahead(waiting):
    bound = len(waiting) + 1
    if has_room(waiting, bound=bound) and bound >= 2:
        assert bound < MAX_BOUND
        assert sum(waiting) < AHEAD_S

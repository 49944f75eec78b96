"""Two prompts in hand at most: one that may sample, one that only decodes and saves."""

from __future__ import annotations

from types import SimpleNamespace

from comfyfleet.engine.server.lanes import Lanes, Running


def run(number: int) -> Running:
    return Running(number=number, record=SimpleNamespace(), teller=SimpleNamespace())


def numbers(lanes: Lanes) -> list[int]:
    return [running.number for running in lanes.all()]


def test_the_next_may_start_once_the_first_has_sampled() -> None:
    lanes = Lanes()
    lanes.enter(run(1))
    assert not lanes.is_open

    lanes.sampled(1)

    assert lanes.is_open
    lanes.enter(run(2))
    assert numbers(lanes) == [1, 2]


def test_a_third_waits_until_the_slow_first_has_ended() -> None:
    lanes = Lanes()
    lanes.enter(run(1))
    lanes.sampled(1)
    lanes.enter(run(2))
    lanes.sampled(2)
    assert not lanes.is_open

    assert lanes.leave(1).number == 1

    assert lanes.is_open
    assert numbers(lanes) == [2]


def test_the_second_may_end_first() -> None:
    lanes = Lanes()
    lanes.enter(run(1))
    lanes.sampled(1)
    lanes.enter(run(2))

    lanes.leave(2)

    assert (numbers(lanes), lanes.is_open) == ([1], True)


def test_what_is_not_in_hand_changes_nothing() -> None:
    lanes = Lanes()
    lanes.enter(run(1))

    lanes.sampled(7)

    assert lanes.leave(7) is None
    assert not lanes.is_open

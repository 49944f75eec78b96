"""A data directory with more than one process in it: each has a file of its own, and one at a time gives out slots."""

from __future__ import annotations

import os

import pytest

from comfyfleet.clock import SystemClock
from comfyfleet.control.shared_folder import NotOurTurn, our_turn, own_file


def test_a_second_user_gets_a_file_of_its_own_and_a_successor_the_first_ones(tmp_path):
    first, held = own_file(tmp_path, "webhooks", ".sqlite3")
    second, also_held = own_file(tmp_path, "webhooks", ".sqlite3")
    assert (first.name, second.name) == ("webhooks.sqlite3", "webhooks-2.sqlite3")
    os.close(held)  # as the kernel does for a process that died
    successor, its_lock = own_file(tmp_path, "webhooks", ".sqlite3")
    assert successor == first
    os.close(also_held)
    os.close(its_lock)


@pytest.mark.anyio
async def test_one_at_a_time_is_inside_and_nobody_waits_for_ever(tmp_path):
    lock, clock = tmp_path / "deep" / ".slots.lock", SystemClock()
    async with our_turn(lock, clock, 0.0):
        with pytest.raises(NotOurTurn):
            async with our_turn(lock, clock, 0.05):
                raise AssertionError
    async with our_turn(lock, clock, 0.0):
        pass

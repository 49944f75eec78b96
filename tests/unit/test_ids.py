"""Ids that are neighbours in an index when they are neighbours in time."""

from __future__ import annotations

import uuid

from comfyfleet.ids import SeededIds, SystemIds


def test_ordered_ids_are_uuid7_and_sort_by_their_time():
    for ids in (SystemIds(), SeededIds(1)):
        made = [ids.ordered_id(1_763_830_000.0 + number / 1000) for number in range(100)]

        assert made == sorted(made)
        assert len(set(made)) == 100
        assert {(uuid.UUID(one).version, uuid.UUID(one).variant) for one in made} == {(7, uuid.RFC_4122)}


def test_two_ordered_ids_of_one_moment_differ():
    ids = SystemIds()

    assert len({ids.ordered_id(1.0) for _ in range(1000)}) == 1000

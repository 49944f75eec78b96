"""Ids: what they look like, that neighbours in time are neighbours in an index, and that no two are the same."""

from __future__ import annotations

import os
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


def test_request_ids_are_uuid4():
    ids = SystemIds()
    made = [uuid.UUID(ids.request_id()) for _ in range(1000)]

    assert {(one.version, one.variant) for one in made} == {(4, uuid.RFC_4122)}
    assert len(set(made)) == 1000


def test_a_forked_child_draws_ids_of_its_own():
    ids = SystemIds()
    ids.request_id()  # noise for more lies ready now
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, ids.request_id().encode())
        os._exit(0)
    os.waitpid(child, 0)

    assert os.read(reading, 64).decode() != ids.request_id()
    os.close(reading)
    os.close(writing)

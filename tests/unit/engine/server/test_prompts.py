"""Waiting prompts run by number, ended ones are remembered up to a limit."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.engine.server.prompts import History, PromptQueue, PromptRecord, QueuedPrompt

pytestmark = pytest.mark.anyio


def prompt(prompt_id: str, number: float = 0, **extra_data: object) -> QueuedPrompt:
    return QueuedPrompt(number=number, prompt_id=prompt_id, prompt={}, extra_data=extra_data, outputs=["1"])


async def test_the_lowest_number_goes_first_and_equals_in_order_of_arrival() -> None:
    queue = PromptQueue()
    for prompt_id, number in (("b", 2), ("a", 1), ("same", 2), ("front", -3)):
        queue.put(prompt(prompt_id, number))

    taken = [(await queue.take()).prompt_id for _ in range(4)]

    assert taken == ["front", "a", "b", "same"]
    assert [item.prompt_id for item in queue.running] == taken
    for item in queue.running[:3]:
        queue.ended(item)
    assert queue.remaining == 1


async def test_a_prompt_that_arrives_later_wakes_who_waits() -> None:
    queue = PromptQueue()
    taken = []

    async def take() -> None:
        taken.append(await queue.take())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        queue.put(prompt("late"))

    assert taken[0].prompt_id == "late"


async def test_numbers_go_on_and_front_is_their_negative() -> None:
    queue = PromptQueue()

    assert [queue.next_number(front=front) for front in (False, False, True, False, True)] == [0, 1, -2, 3, -4]


async def test_only_what_waits_can_be_deleted() -> None:
    queue = PromptQueue()
    queue.put(prompt("running"))
    await queue.take()
    queue.put(prompt("waiting"))

    assert not queue.delete({"running", "unknown"})
    assert queue.delete({"waiting"})
    assert not queue.clear()
    assert queue.remaining == 1


@given(numbers=st.lists(st.floats(allow_nan=False), max_size=20), doomed=st.sets(st.integers(0, 19)))
async def test_a_deletion_never_disturbs_the_order_of_the_rest(numbers: list[float], doomed: set[int]) -> None:
    queue = PromptQueue()
    for place, number in enumerate(numbers):
        queue.put(prompt(str(place), number))
    queue.delete({str(place) for place in doomed})

    taken = [await queue.take() for _ in range(queue.remaining)]

    expected = sorted((number, place) for place, number in enumerate(numbers) if place not in doomed)
    assert [item.prompt_id for item in taken] == [str(place) for _, place in expected]


def test_secrets_of_a_prompt_are_listed_while_it_waits_but_not_remembered() -> None:
    item = prompt("a", api_key_comfy_org="key", auth_token_comfy_org="token", client_id="c")

    assert "api_key_comfy_org" in item.listed()[3]
    assert item.remembered()[3] == {"client_id": "c"}


def test_history_forgets_the_oldest_and_gives_pages() -> None:
    history = History(limit=3)
    for name in "abcde":
        history.add(name, PromptRecord(item=prompt(name)).entry(outputs={}, success=True, miniature=False))

    assert list(history.page(None, -1)) == ["c", "d", "e"]
    assert list(history.page(2, -1)) == ["d", "e"]
    assert list(history.page(1, 0)) == ["c"]
    assert list(history.page(9, 1)) == ["d", "e"]
    assert history.get("a") == {}
    history.delete(["d", "unknown"])
    assert list(history.page(None, -1)) == ["c", "e"]


def test_a_later_prompt_with_the_same_id_takes_the_place_of_the_earlier() -> None:
    history = History()
    history.add("a", {"first": True})
    history.add("a", {"second": True})

    assert history.get("a") == {"a": {"second": True}}

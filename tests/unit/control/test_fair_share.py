"""Whose job is next: by weight and by work, with nobody starved and nothing earned by idling."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.control.fair_share import FairShare


def served(share: FairShare, rounds: int, waiting, cost=lambda scope: 100.0, weight=lambda scope: 1.0) -> Counter:
    work = Counter()
    for _ in range(rounds):
        scope = share.next(waiting)
        share.served(scope, cost(scope), weight(scope))
        work[scope] += cost(scope)
    return work


def test_a_key_with_many_jobs_does_not_starve_one_with_few():
    share = FairShare()
    served(share, 1000, ["many"])

    assert set(served(share, 4, ["many", "few"]).values()) == {200.0}


def test_shares_follow_weights_in_work_not_in_jobs():
    work = served(
        FairShare(),
        3000,
        ["a", "b"],
        cost=lambda scope: 10.0 if scope == "a" else 70.0,
        weight=lambda scope: 3.0 if scope == "a" else 1.0,
    )

    assert 2.8 < work["a"] / work["b"] < 3.2


def test_idling_earns_nothing():
    share = FairShare()
    served(share, 10, ["a", "b"])
    served(share, 500, ["a"])

    assert served(share, 20, ["a", "b"])["b"] <= 1100.0


def test_nobody_waiting_is_nobodys_turn():
    assert FairShare().next([]) is None


@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=60))
def test_whoever_keeps_waiting_is_served_within_a_bounded_number_of_turns(turns):
    share, since = FairShare(), Counter()
    for waiting in turns:
        scope = share.next(sorted(waiting))
        share.served(scope, 100.0)
        for other in "abcd":
            since[other] = since[other] + 1 if other in waiting and other != scope else 0
        assert max(since.values()) <= 6


def test_tens_of_thousands_of_scopes_are_kept_apart_without_a_look_at_all_of_them_at_every_turn():
    share = FairShare()

    # Looked through at every turn this takes a minute.
    for number in range(30_000):
        share.served(f"key{number}", 2.0 if number % 2 else 1.0)

    assert share.next({"key20001", "key20002", "key20003"}) == "key20002"

"""The sums a worker reports: nothing is lost by an undelivered report, nothing is told twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.worker.agent.load_book import LoadBook


def test_a_request_is_load_until_it_ends_and_then_it_is_work_done() -> None:
    book = LoadBook()

    book.begin(reqnum=1, request_idx=7, cost=100.0, now=10.0)
    assert (book.current_load, book.working_request_idxs()) == (100.0, (7,))

    book.end(reqnum=1, status="Success", now=12.0)
    assert book.current_load == 0
    assert book.draft().cur_perf == 100.0
    assert [(r.request_idx, r.success, r.status) for r in book.unreported()] == [(7, True, "Success")]


def test_a_failed_job_is_no_success_and_a_cancelled_one_neither() -> None:
    book = LoadBook()
    for reqnum, status in enumerate(("Error", "Cancelled")):
        book.begin(reqnum=reqnum, request_idx=reqnum + 1, cost=50.0, now=0.0)
        book.end(reqnum=reqnum, status=status, now=1.0)

    assert [(r.success, r.status) for r in book.unreported()] == [(False, "Error"), (False, "Cancelled")]
    assert book.draft().new_load == 50.0  # received less cancelled


@given(st.lists(st.tuples(st.floats(0, 1e6), st.booleans()), max_size=30))
def test_what_is_delivered_in_pieces_adds_up_to_what_happened(events: list[tuple[float, bool]]) -> None:
    book, told = LoadBook(), 0.0
    for number, (cost, is_delivered) in enumerate(events):
        book.begin(reqnum=number, request_idx=0, cost=cost, now=0.0)
        sums = book.draft()
        if is_delivered:
            told += sums.new_load
            book.delivered(sums)

    total = sum(cost for cost, _ in events)
    assert abs(told + book.draft().new_load - total) <= 1e-6 * max(1.0, total)

"""What waits, counted in memory: kept up by what comes and goes, mended by the store, never blind to a new job."""

from __future__ import annotations

from comfyfleet.control.backlog import Backlog
from comfyfleet.control.jobs import Waiting


def test_what_comes_and_goes_is_counted():
    backlog = Backlog()
    for at in (5.0, 3.0):
        backlog.add(1, "a", 100.0, at)
    backlog.add(1, "b", 7.0, 9.0)
    backlog.remove(1, "a", 100.0)

    assert sorted(backlog.scopes(1)) == ["a", "b"]
    assert (backlog.total(1).jobs, backlog.total(1).cost, backlog.total(1).oldest_at) == (2, 107.0, 3.0)
    assert backlog.of_scope("a") == 1
    backlog.remove(1, "a", 100.0)
    backlog.remove(1, "nobody", 1.0)
    assert backlog.scopes(1) == ["b"]
    assert backlog.scopes(2) == []


def test_a_job_accepted_while_the_store_is_asked_is_not_forgotten():
    backlog = Backlog()
    backlog.add(1, "drifted", 100.0, 1.0)
    backlog.begin_sync()
    backlog.add(1, "new", 100.0, 2.0)
    backlog.replace([Waiting(endpoint_id=1, scope="old", jobs=3, cost=300.0, oldest_at=0.5)])

    assert sorted(backlog.scopes(1)) == ["new", "old"]
    assert backlog.total(1).jobs == 4

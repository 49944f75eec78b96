"""Changes of durable jobs made for many callers at once: one statement each, whatever their number.

The functions are batches of `writer.Database.write_batched`; `sql` has the rest of the statements. A statement over
rows is asked for in a few sizes only, so that a database prepares each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import msgspec

from comfyfleet.control.jobs import Job, JobEvent, is_same_request
from comfyfleet.control.store import sql
from comfyfleet.control.store.base import Added, KeyTaken
from comfyfleet.control.store.connection import Connection, Params, Row
from comfyfleet.wire.jobs import JobStatus

T = TypeVar("T")
_MOST_ROWS = 64
_new_job_values = attrgetter(*sql.NEW_JOB_COLUMNS)


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a job; `seq` is given when it is stored."""

    job_id: str
    at: float
    kind: str
    data: str


class Renewal(msgspec.Struct, frozen=True, kw_only=True):
    """The holder of a lease goes on."""

    id: str
    token: str
    expires_at: float


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The worker has begun."""

    id: str
    token: str
    now: float


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """A final status. token: the holder's; None for a job that nobody has."""

    id: str
    token: str | None
    status: JobStatus
    result: str | None
    error: str | None
    now: float

    @property
    def event(self) -> NewEvent:
        return NewEvent(job_id=self.id, at=self.now, kind=str(self.status), data=self.error or "{}")


def job_of(row: Row) -> Job:
    """A row of `sql.JOB_COLUMNS`."""
    values: dict[str, Any] = dict(zip(sql.JOB_COLUMNS, row, strict=True))
    values["status"] = JobStatus(values["status"])
    return Job(**values)


def add_jobs(connection: Connection, submissions: Sequence[Sequence[Job]]) -> list[list[Added]]:
    """Store every caller's new jobs. Raises KeyTaken: the group is rolled back, and each caller is alone with it."""
    jobs = [job for submitted in submissions for job in submitted]
    stored = connection.changes(_statements(sql.ADD_JOBS, [_new_job_values(job) for job in jobs]))
    if stored == len(jobs):
        return [[Added(job=job, is_repeat=False) for job in submitted] for submitted in submissions]
    # A key is taken. Or our own id is there already: the commit was done, its confirmation lost with the connection.
    ours = {row[0] for row in connection.all_rows(_statements(sql.KNOWN_IDS, [(job.id,) for job in jobs]))}
    return [
        [Added(job=job, is_repeat=False) if job.id in ours else _earlier(connection, job) for job in submitted]
        for submitted in submissions
    ]


def _earlier(connection: Connection, job: Job) -> Added:
    params = {"scope": job.scope, "idempotency_key": job.idempotency_key}
    earlier = job_of(connection.rows(sql.JOB_BY_KEY, params)[0])
    if not is_same_request(earlier.digest, job.digest):
        raise KeyTaken(earlier.id)
    return Added(job=earlier, is_repeat=True)


def add_events(connection: Connection, events: Sequence[NewEvent]) -> list[JobEvent]:
    """Store events, each with the next number of its job."""
    numbers: dict[int, int] = {}
    for places in _rounds([event.job_id for event in events]):
        rows = [msgspec.structs.astuple(events[place]) for place in places]
        given = {job_id: int(seq) for job_id, seq in connection.all_rows(_statements(sql.ADD_EVENTS, rows))}
        numbers.update((place, given[events[place].job_id]) for place in places)
    return [
        JobEvent(job_id=event.job_id, seq=numbers[place], at=event.at, kind=event.kind, data=event.data)
        for place, event in enumerate(events)
    ]


def renew(connection: Connection, renewals: Sequence[Renewal]) -> list[bool]:
    """Which of the leases are still their holder's."""
    return _guarded(connection, sql.RENEW_MANY, renewals, msgspec.structs.astuple)


def start(connection: Connection, starts: Sequence[Start]) -> list[bool]:
    """LEASED to RUNNING, with its event."""
    done = _guarded(connection, sql.START_MANY, starts, msgspec.structs.astuple)
    _tell(connection, done, [NewEvent(job_id=one.id, at=one.now, kind="running", data="{}") for one in starts])
    return done


def finish(connection: Connection, endings: Sequence[Ending]) -> list[bool]:
    """A holder's job to its final status, with its event."""
    done = _guarded(connection, sql.FINISH_MANY, endings, _ending_values)
    _tell(connection, done, [ending.event for ending in endings])
    return done


def end_waiting(connection: Connection, endings: Sequence[Ending]) -> list[bool]:
    """A waiting job to its final status, with its event."""
    done = _guarded(
        connection, sql.END_WAITING_MANY, endings, lambda one: (one.id, str(one.status), one.error, one.now)
    )
    _tell(connection, done, [ending.event for ending in endings])
    return done


def _ending_values(one: Ending) -> tuple[Any, ...]:
    return one.id, one.token, str(one.status), one.result, one.error, one.now


def _tell(connection: Connection, done: Sequence[bool], events: Sequence[NewEvent]) -> None:
    add_events(connection, [event for is_done, event in zip(done, events, strict=True) if is_done])


_Item = TypeVar("_Item", Renewal, Start, Ending)


def _guarded(
    connection: Connection, text: str, items: Sequence[_Item], values: Callable[[_Item], tuple[Any, ...]]
) -> list[bool]:
    """Run a guarded update over all items; whether each changed its job. Two of one job go one after the other."""
    done = [False] * len(items)
    for places in _rounds([item.id for item in items]):
        rows = [values(items[place]) for place in places]
        changed = {row[0] for row in connection.all_rows(_statements(text, rows))}
        for place in places:
            done[place] = items[place].id in changed
    return done


def _rounds(keys: Sequence[str]) -> Iterator[list[int]]:
    """Places of distinct keys, in as few lists as it takes: nearly always one."""
    left = list(range(len(keys)))
    while left:
        first: dict[str, int] = {}
        for place in left:
            first.setdefault(keys[place], place)
        places = list(first.values())
        yield places
        left = [place for place in left if first[keys[place]] != place]


def _statements(text: str, rows: Sequence[Sequence[Any]]) -> list[tuple[str, Params]]:
    """The statement over all rows, in pieces of 1, 2, 4 … rows; each row in the order of its placeholders."""
    found: list[tuple[str, Params]] = []
    at = 0
    while at < len(rows):
        count = min(_MOST_ROWS, 1 << ((len(rows) - at).bit_length() - 1))
        statement, names = _over(text, count)
        values = [value for row in rows[at : at + count] for value in row]
        found.append((statement, dict(zip(names, values, strict=True))))
        at += count
    return found


def statement_over(text: str, count: int) -> str:
    """The statement over `count` rows."""
    return _over(text, count)[0]


@lru_cache(maxsize=256)
def _over(text: str, count: int) -> tuple[str, tuple[str, ...]]:
    """(statement, names of its parameters) over `count` rows: `{(:a, :b)}` becomes `(:a_0, :b_0), (:a_1, :b_1)`."""
    before, _, rest = text.partition("{")
    row, _, after = rest.partition("}")
    names = sql.PARAMETER.findall(row)
    rows = ", ".join(sql.PARAMETER.sub(rf":\1_{number}", row) for number in range(count))
    return f"{before}{rows}{after}", tuple(f"{name}_{number}" for number in range(count) for name in names)

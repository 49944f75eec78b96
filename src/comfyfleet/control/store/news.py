"""What one process tells the others that share its database: which jobs changed, which are to be cancelled.

Hints only. The store is the truth and every waiter looks again by itself in the end; a hint makes it look now. It is
sent after the commit it speaks of, beside the callers' way, and may be lost with a connection: then `is_all` follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

CHANNEL = "comfyfleet"
# A notification holds 8000 bytes; an id of ours has 36.
_MOST_IDS = 150


class News(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """jobs: something about them changed. cancels: their callers want them no more. endpoints: jobs wait there anew.

    is_all: anything may have changed. teller: whose word it is.
    """

    jobs: tuple[str, ...] = ()
    cancels: tuple[str, ...] = ()
    endpoints: tuple[int, ...] = ()
    is_all: bool = False
    teller: str = ""


Hear = Callable[[News], None]


def packed(news: Iterable[News], teller: str) -> Iterator[str]:
    """As few payloads as hold all of it."""
    told = list(news)
    jobs = list(dict.fromkeys(job_id for one in told for job_id in one.jobs))
    cancels = list(dict.fromkeys(job_id for one in told for job_id in one.cancels))
    endpoints = tuple(sorted({endpoint_id for one in told for endpoint_id in one.endpoints}))
    while jobs or cancels or endpoints:
        now = News(jobs=tuple(jobs[:_MOST_IDS]), teller=teller)
        jobs = jobs[_MOST_IDS:]
        if not jobs:
            room = _MOST_IDS - len(now.jobs)
            now = msgspec.structs.replace(now, cancels=tuple(cancels[:room]), endpoints=endpoints[:_MOST_IDS])
            cancels, endpoints = cancels[room:], endpoints[_MOST_IDS:]
        yield msgspec.json.encode(now).decode()


def unpacked(payload: str) -> News:
    """A payload of this or another version of us: what it does not say is empty."""
    try:
        return msgspec.json.decode(payload, type=News)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return News(is_all=True)

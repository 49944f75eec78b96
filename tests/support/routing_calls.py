"""Calls that stories of routing make against a real control plane, and workers that end with their test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from support.played_worker import PlayedWorker
from support.vastai import run_vastai


def make_endpoint(plane, name: str, **fields) -> str:
    body = {"endpoint_name": name, "cold_workers": 0, "min_load": 0.0, **fields}
    status, made = plane.call("POST", "/api/v0/endptjobs/", body)
    assert status == 200, made
    return name


def route(plane, endpoint: str, **fields):
    """(status, body) of one route call."""
    return plane.call("POST", "/route/", {"endpoint": endpoint, "api_key": plane.key, **fields}, key="")


def ready(plane, endpoint: str, **fields) -> dict:
    status, body = route(plane, endpoint, **fields)
    assert status == 200, body
    assert "url" in body, body
    return body


def request_through_client(plane, endpoint: str, *, timeout: float = 30.0, key: str = "", **request) -> dict:
    """One request by the unmodified client (with the admin's key, or that one); its whole result."""
    return run_vastai(
        """
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            endpoint = await client.get_endpoint(NAME)
            RESULT = await endpoint.request("/generate/sync", {"input": {}}, timeout=TIMEOUT, **REQUEST)
        """,
        base=plane.base,
        key=key or plane.key,
        NAME=endpoint,
        TIMEOUT=timeout,
        REQUEST=request,
    )


def listed_state(plane, endpoint: str, worker: PlayedWorker) -> str:
    _, rows = plane.call("GET", "/v1/workers")
    return next(row["status"] for row in rows["workers"] if row["id"] == worker.id)


@contextmanager
def played_workers(plane) -> Iterator:
    """Make played workers, and end them."""
    made: list[PlayedWorker] = []

    def make(endpoint: str, **given) -> PlayedWorker:
        made.append(PlayedWorker(plane, endpoint, **given))
        return made[-1]

    yield make
    for worker in made:
        if not worker.is_dead:
            worker.die()
        plane.call("DELETE", f"/v1/workers/{worker.id}")

"""kill -9 of the control plane under load: nothing accepted is lost or rendered twice, no caller is refused."""

from __future__ import annotations

import http.client
import random
import threading
import time
import urllib.error
from collections import Counter

import pytest

from support.fleet_world import FleetWorld, a_graph

pytestmark = [pytest.mark.timeout(280)]


class Callers:
    """Threads that submit and look, and write down every connection that failed to open."""

    def __init__(self, world: FleetWorld, count: int) -> None:
        self.accepted: list[str] = []
        self.refused: list[str] = []
        self._world = world
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._submit, args=(n,)) for n in range(count)]
        self._lock = threading.Lock()

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _submit(self, caller: int) -> None:
        number = caller * 100_000
        while not self._stop.is_set():
            number += 1
            body = {
                "endpoint": "comfy",
                "input": {"workflow_json": a_graph(number)},
                "idempotency_key": f"{caller}-{number}",
            }
            while not self._stop.is_set():
                try:
                    status, answer = self._world.plane.call("POST", "/v1/jobs", body)
                except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                    # Cut off in the middle: sent again under the same key, as a client does. Never "refused".
                    if isinstance(getattr(error, "reason", error), ConnectionRefusedError):
                        self.refused.append(str(error))
                    continue
                assert status == 202, answer
                with self._lock:
                    self.accepted.append(answer["id"])
                break
            time.sleep(0.05)


def killed_again_and_again(world: FleetWorld, kills: int, dice: random.Random) -> None:
    with Callers(world, 4) as callers:
        for _ in range(kills):
            time.sleep(dice.uniform(0.3, 1.5))
            world.plane.kill()
            world.plane.start()
    world.until_ready()

    assert callers.refused == []
    assert len(callers.accepted) > kills
    assert len(set(callers.accepted)) == len(callers.accepted)
    # A caller that was cut off when the load ended never heard of its last job, which was accepted all the same.
    stored = world.every_job()
    assert set(callers.accepted) <= set(stored)
    jobs = [world.until(job_id, limit_s=90) for job_id in stored]
    assert Counter(job["status"] for job in jobs) == {"completed": len(jobs)}
    # Each job saves under a prefix of its own, and an engine numbers what it saves under one: a second render of a
    # job would be its _00002_.
    rendered = Counter(path.name for path in world.rendered_files())
    assert set(rendered) == {job["result"]["output"][0]["filename"] for job in jobs}
    assert set(rendered.values()) == {1}
    assert [name for name in rendered if "_00001_" not in name] == []


@pytest.fixture
def world(tmp_path):
    world = FleetWorld(tmp_path, job_s=0.02)
    try:
        yield world.start()
    finally:
        world.close()


@pytest.mark.slow
def test_five_kills_under_load_lose_nothing_and_render_nothing_twice(world):
    killed_again_and_again(world, 5, random.Random(7))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fifty_kills_under_load_lose_nothing_and_render_nothing_twice(world):
    killed_again_and_again(world, 50, random.Random(11))

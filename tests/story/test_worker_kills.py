"""kill -9 of the worker and of its engine at random, seeded moments: every accepted job ends exactly once.

Twenty jobs here, five hundred in `make soak`. The engine is a foreign one, so that it survives the worker and its
ledger counts every render over all its lives. Renders may exceed the jobs only by what the engine itself lost.
"""

from __future__ import annotations

import random

import aiohttp
import anyio
import pytest

from comfyfleet.testing.processes import a_worker, fake_engine, picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


async def hunt(tmp_path, *, jobs, kills, seed, job_s):
    """Accept `jobs` while killing worker and engine in turn; (answers, distinct renders done, starts, starts lost)."""
    dice = random.Random(seed)
    engine = fake_engine(tmp_path / "engine")
    engine.start()
    await engine.until("/system_stats")
    accepted = []
    try:
        async with a_worker(tmp_path, backends=(engine.base_url,), MAX_QUEUE_SIZE="1000") as worker:

            async def accept(number):
                graph = picture(number, prefix=f"hunt/{number}", seconds=job_s)
                for _ in range(200):  # a killed worker is back in a moment; the same id makes asking again safe
                    try:
                        status, _ = await worker.generate(graph, path="/generate", request_id=f"hunt-{number}")
                        assert status in (200, 202)
                        return
                    except (OSError, aiohttp.ClientError):
                        await anyio.sleep(0.1)
                raise AssertionError("the worker did not come back")

            async def killer():
                for kill in range(kills):
                    await anyio.sleep(dice.uniform(0.2, 1.5))
                    victim = (worker, engine)[kill % 2]
                    victim.kill()
                    await anyio.sleep(dice.uniform(0.0, 0.3))
                    victim.start()
                    await victim.until("/queue-info" if victim is worker else "/system_stats")

            async with anyio.create_task_group() as both:
                both.start_soon(killer)
                for number in range(jobs):
                    await accept(number)
                    accepted.append(f"hunt-{number}")
                    await anyio.sleep(dice.uniform(0.0, 0.1))
            answers = [await worker.settled(job_id) for job_id in accepted]
    finally:
        engine.kill()
    marks = [line.split() for line in engine.ledger if "canary" not in line]
    started = [prompt for what, prompt in marks if what == "start"]
    done = [prompt for what, prompt in marks if what == "done"]
    return answers, started, done


def check(answers, started, done, jobs):
    assert [status for status, _ in answers] == [200] * jobs
    assert len({answer["id"] for _, answer in answers}) == jobs
    # Equal pictures would hide a mix-up: every job has a colour of its own.
    assert len({answer["output"][0]["sha256"] for _, answer in answers}) == jobs
    lost = len(started) - len(done)
    assert len(started) == len(set(started)), "one prompt id was rendered twice"
    # A render may be done and its engine die before anybody could read the history: the engine lost it all the same.
    unread = len(done) - jobs
    assert 0 <= unread <= 3 + jobs // 50
    assert len(started) == jobs + lost + unread


@pytest.mark.timeout(120)
async def test_twenty_jobs_through_five_kills_end_exactly_once(tmp_path):
    answers, started, done = await hunt(tmp_path, jobs=20, kills=5, seed=4, job_s=0.1)

    check(answers, started, done, 20)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_five_hundred_jobs_through_a_hundred_kills_end_exactly_once(tmp_path):
    answers, started, done = await hunt(tmp_path, jobs=500, kills=100, seed=500, job_s=0.15)

    print(f"500 jobs, {len(started)} renders begun, {len(done)} done")
    check(answers, started, done, 500)

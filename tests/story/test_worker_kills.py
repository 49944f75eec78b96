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
    """Accept `jobs` while killing worker and engine in turn; (answers, the engine's ledger)."""
    dice = random.Random(seed)
    engine = fake_engine(tmp_path / "engine")
    engine.start()
    await engine.until("/system_stats")
    accepted = []
    try:
        async with a_worker(tmp_path, backends=(engine.base_url,), MAX_QUEUE_SIZE="1000") as worker:

            async def accept(number):
                graph = picture(number, prefix=f"hunt/{number}", seconds=job_s)
                for _ in range(1200):  # a killed worker is back in a moment; the same id makes asking again safe
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
    return answers, [line.split() for line in engine.ledger if "canary" not in line]


def check(answers, ledger, jobs):
    assert [status for status, _ in answers] == [200] * jobs
    assert len({answer["id"] for _, answer in answers}) == jobs
    # Equal pictures would hide a mix-up: every job has a colour of its own.
    assert len({answer["output"][0]["sha256"] for _, answer in answers}) == jobs

    answered = {answer["comfyui_response"]["execution_details"]["prompt_id"] for _, answer in answers}
    started = [prompt for what, prompt in ledger if what == "start"]
    done = [prompt for what, prompt in ledger if what == "done"]
    assert len(started) == len(set(started)), "one prompt id was rendered twice"
    assert len(answered) == jobs
    assert answered <= set(done)
    # Renders equal distinct ids plus those that the engine itself lost: whatever else was begun, the engine had it
    # (unfinished, or finished and not yet read) in a life that a kill ended.
    last_life = max(index for index, (what, _) in enumerate(ledger) if what == "life")
    in_last_life = {prompt for what, prompt in ledger[last_life:] if what == "start"}
    assert in_last_life <= answered
    return len(started) - jobs


@pytest.mark.timeout(280)
async def test_twenty_jobs_through_five_kills_end_exactly_once(tmp_path):
    answers, ledger = await hunt(tmp_path, jobs=20, kills=5, seed=4, job_s=0.1)

    check(answers, ledger, 20)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_five_hundred_jobs_through_a_hundred_kills_end_exactly_once(tmp_path):
    answers, ledger = await hunt(tmp_path, jobs=500, kills=100, seed=500, job_s=0.15)

    lost = check(answers, ledger, 500)
    print(f"500 jobs through 100 kills: all completed, none rendered twice; {lost} renders died with the engine")

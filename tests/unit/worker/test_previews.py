"""A stream shows small pictures of the render when it asks for them, and carries none otherwise."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import msgspec
import pytest
from starlette.datastructures import Headers

from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.api.generate import GenerateRoutes
from comfyfleet.worker.engines.client import Preview
from comfyfleet.worker.engines.watch import PromptWatch
from comfyfleet.worker.job import Finished, Job, RunEvent
from comfyfleet.worker.queue import QueueView

pytestmark = pytest.mark.anyio


class ALine:
    """What a stream asks of the service: the job's own log, and how the line stands."""

    async def events(self, job: Job, *, after: int = 0) -> AsyncIterator[RunEvent]:
        async for event in job.events.follow(after):
            yield event

    def queue_view(self, job: Job) -> QueueView:
        return QueueView(waiting=0, generating=1, storing=0, limit=1, next_place_s=1.0, wait_s=None)

    def hung_up(self, job: Job) -> None:
        job.callers -= 1


def a_rendering_job(clock: FakeClock) -> Job:
    """Half done, with a picture to show, and then finished."""
    job = Job(
        id="job",
        scope="",
        key="job",
        folder="job",
        request=GenerateInput(),
        fingerprint="",
        accepted_at=clock.now(),
        prompt_id="p",
    )
    job.watch = PromptWatch("p", clock=clock)
    job.watch.hear(Preview(mime="image/jpeg", data=b"small picture"))
    job.advance(RunStatus.PROCESSING, clock.now())
    job.advance(RunStatus.GENERATING, clock.now())
    job.events.add(clock.now(), RunStatus.GENERATING, "Generating: KSampler.", progress=50.0, node="3", step=2, steps=4)
    job.finished = Finished(status=RunStatus.COMPLETED, http_status=200, body=b'{"id":"job"}')
    job.events.close()
    job.done.set()
    return job


async def frames(clock: FakeClock, **headers: str) -> list[dict]:
    routes = GenerateRoutes(ALine(), clock, max_body_bytes=1, include_response=True)
    answer = routes.follow(a_rendering_job(clock), Headers(headers))
    lines = b"".join([chunk async for chunk in answer.body_iterator]).splitlines()
    return [msgspec.json.decode(line.removeprefix(b"data:")) for line in lines if line.startswith(b"data:")]


async def test_progress_comes_with_a_picture_when_it_was_asked_for(clock: FakeClock) -> None:
    shown = await frames(clock, **{"x-include-previews": "1"})
    plain = await frames(clock)

    picture = f"data:image/jpeg;base64,{base64.b64encode(b'small picture').decode()}"
    assert [frame.get("preview") for frame in shown if "progress" in frame] == [picture]
    assert [frame["progress"]["percentage"] for frame in plain if "progress" in frame] == [50.0]
    assert not any("preview" in frame for frame in plain)
    assert shown[-1]["result"] == {"id": "job"}

"""A render whose upload takes long is found by a next process: that very render, and only while its job is open."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyfleet.sealing import Sealer
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.engines.client import HistoryEntry
from comfyfleet.worker.job import Finished, Job
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.rendered import Rendered, RenderedJobs
from comfyfleet.worker.stages.history_files import read_made

pytestmark = pytest.mark.anyio

SEALER = Sealer(b"k" * 32, "journal")
ENTRY = HistoryEntry(
    prompt=[1, "p", {"1": {"inputs": {"text": "a secret"}}}],
    outputs={"9": {"images": [{"filename": "a.png"}], "text": ["a word"]}},
    status={"status_str": "success"},
    meta={"miniature": True},
)
MADE = Rendered(
    entry=ENTRY,
    made=read_made(ENTRY),
    folders={"output": Path("/engine/output"), "temp": Path("/engine/temp")},
)


@pytest.fixture
async def journal(tmp_path: Path):
    journal = Journal(tmp_path / "journal.sqlite3", SEALER)
    yield journal
    await journal.close()


def a_job(name: str, prompt_id: str) -> Job:
    return Job(
        id=name,
        scope="",
        key=name,
        folder=name,
        request=GenerateInput(),
        fingerprint="f",
        accepted_at=0.0,
        prompt_id=prompt_id,
    )


async def test_the_next_process_finds_it_whole_and_nobody_reads_it_from_the_disk(journal: Journal, tmp_path: Path):
    job = a_job("one", "prompt-1")
    await journal.accept(job)
    await RenderedJobs(journal, SEALER).keep(job, MADE)

    assert RenderedJobs(journal, SEALER).find(job) == MADE
    assert RenderedJobs(journal, Sealer(b"x" * 32, "journal")).find(job) is None
    assert not any(b"a secret" in path.read_bytes() for path in tmp_path.iterdir())


async def test_another_run_of_the_same_job_is_not_taken_for_it(journal: Journal):
    job = a_job("one", "prompt-1")
    await journal.accept(job)
    renders = RenderedJobs(journal, SEALER)
    await renders.keep(job, MADE)

    assert renders.find(a_job("one", "prompt-2")) is None


async def test_a_render_goes_when_its_job_has_ended_and_another_comes(journal: Journal):
    first, second = a_job("one", "prompt-1"), a_job("two", "prompt-2")
    renders = RenderedJobs(journal, SEALER)
    for job in (first, second):
        await journal.accept(job)
    await renders.keep(first, MADE)
    await journal.finish(first, Finished(status=RunStatus.COMPLETED, http_status=200, body=b"{}"), 1.0)
    await renders.keep(second, MADE)

    assert (renders.find(first), renders.find(second)) == (None, MADE)

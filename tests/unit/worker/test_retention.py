"""A result's files go when its time is over and no link that anybody was given leads to them; not before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from comfyfleet.ids import SeededIds
from comfyfleet.sealing import Sealer
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.local import LocalStorage
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.generation import GenerateInput, GenerateResult, OutputEntry
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.job import Finished, Job
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.upkeep import Retention

pytestmark = pytest.mark.anyio

HOUR = 3600.0
HERE, BUCKET = "http://files.test", "https://bucket.test/kept"


@dataclass
class AWorker:
    """Its journal, its output folder, and who is at work."""

    root: Path
    journal: Journal
    clock: FakeClock
    live: set[str] = field(default_factory=set)

    @property
    def retention(self) -> Retention:
        signer = UrlSigner(b"k" * 32, self.clock)
        return Retention(
            self.journal,
            LocalStorage(self.root, HERE, signer, self.clock),
            result_ttl_s=6 * HOUR,
            live_folders=lambda: self.live,
            clock=self.clock,
            ids=SeededIds(1),
        )

    async def job(self, name: str, *, links: str = HERE, links_last_s: float = HOUR) -> Path:
        """A finished job with one file; the file."""
        now = self.clock.now()
        job = Job(
            id=name,
            scope="",
            key=name,
            folder=name,
            request=GenerateInput(),
            fingerprint="",
            accepted_at=now,
            prompt_id="p",
        )
        file = self.root / name / "sub" / "a.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"picture")
        url = f"{links}/files/{name}/sub/a.png?signature=x"
        output = OutputEntry(
            filename="a.png",
            local_path=str(file),
            url=url,
            url_expires_at=now + links_last_s,
            type="output",
            subfolder="sub",
            node_id="9",
            output_type="images",
        )
        result = GenerateResult(id=name, message="", status="completed", output=[output])
        await self.journal.accept(job)
        end = Finished(status=RunStatus.COMPLETED, http_status=200, body=msgspec.json.encode(result))
        await self.journal.finish(job, end, now)
        return file


@pytest.fixture
async def worker(tmp_path: Path, clock: FakeClock):
    journal = Journal(tmp_path / "journal.sqlite3", Sealer(b"k" * 32, "journal"))
    yield AWorker(tmp_path / "output", journal, clock)
    await journal.close()


async def test_files_outlive_their_result_by_as_long_as_a_link_may_lead_to_them(worker: AWorker, clock: FakeClock):
    file = await worker.job("one", links_last_s=24 * HOUR)

    await clock.advance(6 * HOUR - 1)
    assert await worker.retention.forget_once() == 0
    assert worker.journal.find(scope="", key="one") is not None  # read now, it gives links for another day

    await clock.advance(2)
    assert await worker.retention.forget_once() == 0
    assert worker.journal.find(scope="", key="one") is None
    assert file.exists()

    await clock.advance(24 * HOUR - 10)
    assert await worker.retention.forget_once() == 0
    await clock.advance(20)
    assert await worker.retention.forget_once() == 1
    assert not (worker.root / "one").exists()
    assert list((worker.root / ".drafts").iterdir()) == []


async def test_files_whose_links_lead_to_a_store_go_with_their_result(worker: AWorker, clock: FakeClock):
    file = await worker.job("one", links=BUCKET, links_last_s=168 * HOUR)

    await clock.advance(6 * HOUR + 1)

    assert await worker.retention.forget_once() == 1
    assert not file.exists()


async def test_a_job_that_uses_the_folder_again_keeps_it(worker: AWorker, clock: FakeClock):
    file = await worker.job("one", links=BUCKET)
    await clock.advance(6 * HOUR + 1)
    worker.live = {"one"}

    assert await worker.retention.forget_once() == 0
    assert file.exists()


async def test_a_folder_that_is_gone_already_is_no_trouble_and_hundreds_go_in_one_round(
    worker: AWorker, clock: FakeClock
):
    files = [await worker.job(f"job-{number}", links=BUCKET) for number in range(230)]
    files[0].unlink()
    files[0].parent.rmdir()
    files[0].parent.parent.rmdir()
    await clock.advance(6 * HOUR + 1)

    assert await worker.retention.forget_once() == 229
    assert await worker.retention.forget_once() == 0
    assert not any(file.exists() for file in files)

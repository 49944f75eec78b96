"""A long upload goes on where it was, whoever dies in the middle of it; what nobody will finish is taken away."""

from __future__ import annotations

import hashlib
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import pytest
from aiohttp_s3_client import S3Client
from anyio.lowlevel import checkpoint

from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.sealing import Sealer
from comfyfleet.settings.storage import S3Settings
from comfyfleet.storage.base import StorageFailed
from comfyfleet.storage.long_uploads import PART_BYTES, PARTS_AT_ONCE, LongUploads, long_uploads
from comfyfleet.storage.s3 import S3Storage
from comfyfleet.storage.s3_parts import S3Parts
from comfyfleet.storage.upload_book import OpenUpload, UploadBook
from comfyfleet.testing.clock import FakeClock
from comfyfleet.testing.fault_proxy import Fault, FaultProxy, fault_proxy
from comfyfleet.testing.processes import a_worker
from comfyfleet.testing.s3_server import s3_server
from comfyfleet.worker.stages.tidy_uploads import TidyUploads

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(280)]

MB = 1024 * 1024
# What may be on its way when somebody dies: as many parts as are sent side by side, and what the sockets hold.
UNDER_WAY = PARTS_AT_ONCE * PART_BYTES + MB


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def settings(s3, endpoint_url: str) -> S3Settings:
    return S3Settings(
        bucket=s3.bucket,
        access_key_id=s3.access_key_id,
        secret_access_key=s3.secret_access_key,
        endpoint_url=endpoint_url,
        connect_timeout_s=2.0,
    )


def a_graph(size: int) -> dict:
    return {"1": {"class_type": "FakeBig", "inputs": {"size_bytes": size, "filename_prefix": "film/big"}}}


def a_file(folder: Path, size: int) -> tuple[Path, str]:
    """A file no two parts of which are equal, and its digest."""
    content = b"".join(number.to_bytes(4, "big") * 256 for number in range(size // 1024))
    path = folder / "film.bin"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


class PatientClock(FakeClock):
    """For whom waiting takes no time: between attempts at a server, and nowhere else."""

    async def sleep(self, seconds: float) -> None:
        await checkpoint()


async def digest_behind(url: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return hashlib.file_digest(answer, "sha256").hexdigest()

    return await anyio.to_thread.run_sync(read)


async def uploads_in_the_bucket(s3, of: str) -> list[str]:
    """What the server itself says is unfinished under these keys."""
    async with aiohttp.ClientSession() as session:
        client = S3Client(
            session,
            f"{s3.endpoint_url}/{s3.bucket}",
            access_key_id=s3.access_key_id,
            secret_access_key=s3.secret_access_key,
            region="us-east-1",
        )
        async with client.request("GET", "", params={"uploads": "", "prefix": of}) as answer:
            assert answer.status == 200
            text = await answer.text()
    return [part.partition("</Key>")[0] for part in text.split("<Key>")[1:]]


async def until_none_is_left(s3, of: str) -> None:
    while True:
        if not await uploads_in_the_bucket(s3, of):
            return
        await anyio.sleep(0.1)


@asynccontextmanager
async def a_process(folder: Path):
    """The uploads of one process, from its start to its end; the file of open ones outlives it."""
    book = UploadBook(folder / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
    async with long_uploads(book, SystemClock(), SystemIds()) as long:
        yield long


async def put(long: LongUploads, to: S3Settings, path: Path, key: str, sha256: str) -> str:
    """Store the file; a link to it."""
    storage = S3Storage(to, SystemClock(), long)
    await storage.put(path, key, media_type="video/mp4", sha256=sha256)
    return (await storage.url(key, expires_in_s=600)).url


async def begin_and_die(folder: Path, proxy: FaultProxy, to: S3Settings, path: Path, key: str, sha256: str) -> None:
    """A process that ends when as many bytes as are let are through."""
    async with a_process(folder) as long, anyio.create_task_group() as life:
        life.start_soon(put, long, to, path, key, sha256)
        await proxy.until_held()
        life.cancel_scope.cancel()
    proxy.release()


async def test_kill_9_in_the_middle_of_an_upload_costs_no_part_that_arrived_and_no_second_render(s3, tmp_path):
    size, sent_before = 64 * MB, 40 * MB
    async with fault_proxy(s3.port) as proxy:
        env = {
            "S3_ENDPOINT_URL": proxy.url,
            "S3_BUCKET_NAME": s3.bucket,
            "S3_ACCESS_KEY_ID": s3.access_key_id,
            "S3_SECRET_ACCESS_KEY": s3.secret_access_key,
        }
        async with a_worker(tmp_path, **env) as worker:
            before = proxy.to_server
            proxy.hold(sent_before)
            await worker.generate(a_graph(size), path="/generate", request_id="killed")
            with anyio.fail_after(120):
                await proxy.until_held()
            worker.kill()
            proxy.release()
            worker.start()
            await worker.until("/queue-info")
            with anyio.fail_after(120):
                status, answer = await worker.settled("killed")

            [output] = answer["output"]
            assert (status, "upload_error" in output, output["size_bytes"]) == (200, False, size)
            assert f"/{s3.bucket}/killed/film/big_00001_.bin?" in output["url"]
            assert await digest_behind(output["url"]) == output["sha256"]
            assert size < proxy.to_server - before < size + UNDER_WAY
            assert len([line for line in worker.ledger if line.startswith("start")]) == 1

            # And a job that is cancelled in the middle leaves nothing in the bucket.
            proxy.hold(10 * MB)
            await worker.generate(a_graph(size), path="/generate", request_id="cancelled")
            with anyio.fail_after(120):
                await proxy.until_held()
            assert await uploads_in_the_bucket(s3, "cancelled/") == ["cancelled/film/big_00002_.bin"]
            await worker.post("/cancel/cancelled", {})
            proxy.release()
            with anyio.fail_after(120):
                await until_none_is_left(s3, "cancelled/")
        assert await uploads_in_the_bucket(s3, "killed/") == []


async def test_only_a_part_that_holds_the_files_own_bytes_is_not_sent_again(s3, tmp_path):
    path, sha256 = a_file(tmp_path, 30 * MB)
    key = "spoiled/film.bin"
    mine = path.read_bytes()
    arrived = {
        1: bytes(PART_BYTES),  # of the right size, and of other bytes
        2: mine[PART_BYTES : 2 * PART_BYTES],
        3: mine[2 * PART_BYTES : 3 * PART_BYTES - 1],  # too short
        9: bytes(PART_BYTES),  # there is no such part
    }
    async with fault_proxy(s3.port) as proxy, a_process(tmp_path) as long, aiohttp.ClientSession() as session:
        to = settings(s3, proxy.url)
        calls = S3Parts(settings(s3, s3.endpoint_url), session, SystemClock(), SystemIds())
        upload_id = await calls.begin(key, headers={})
        for number, data in arrived.items():
            await calls.send(key, upload_id, number, data, hashlib.sha256(data).hexdigest())
        long.book.add(OpenUpload(settings=to, key=key, upload_id=upload_id, sha256=sha256, guarded=False, began_at=0.0))
        url = await put(long, to, path, key, sha256)

        assert await digest_behind(url) == sha256
        assert 25 * MB < proxy.to_server < 26 * MB
        assert long.book.all() == []


@pytest.mark.parametrize("what", ["the server forgot it", "the file is another one", "the keys were changed"])
async def test_an_upload_that_cannot_go_on_begins_again(s3, tmp_path, what):
    path, sha256 = a_file(tmp_path, 20 * MB)
    key = f"again/{what}.bin"
    async with fault_proxy(s3.port) as proxy:
        to = settings(s3, proxy.url)
        proxy.hold(12 * MB)
        await begin_and_die(tmp_path, proxy, to, path, key, sha256)
        if what == "the file is another one":
            path.write_bytes(path.read_bytes()[::-1])
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if what == "the keys were changed":
            (tmp_path / "uploads.sqlite3").unlink()
        async with a_process(tmp_path) as long, aiohttp.ClientSession() as session:
            if what == "the server forgot it":
                [left] = long.book.all()
                await S3Parts(to, session, SystemClock(), SystemIds()).abort(key, left.upload_id)
            url = await put(long, to, path, key, sha256)

        assert await digest_behind(url) == sha256
        if what != "the keys were changed":
            assert await uploads_in_the_bucket(s3, "again/" + what) == []


async def test_a_store_that_is_away_is_asked_again_to_drop_what_an_ended_job_left(s3, tmp_path):
    path, sha256 = a_file(tmp_path, 20 * MB)
    async with fault_proxy(s3.port) as proxy:
        to = settings(s3, proxy.url)
        proxy.hold(7 * MB)
        await begin_and_die(tmp_path, proxy, to, path, "left/film.bin", sha256)
        clock = PatientClock()
        book = UploadBook(tmp_path / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
        async with long_uploads(book, clock, SystemIds()) as long:
            is_open = True
            tidy = TidyUploads(long, lambda folder: is_open and folder == "left", clock, SystemIds())
            await tidy.look_once()
            assert await uploads_in_the_bucket(s3, "left/") == ["left/film.bin"]

            is_open = False
            proxy.faults = lambda _: Fault(status=503)
            before = proxy.connections
            await tidy.look_once()
            tried = proxy.connections
            await tidy.look_once()  # not so soon again
            assert before < tried == proxy.connections
            assert len(long.book.all()) == 1

            proxy.faults = lambda _: Fault()
            clock.jump(3600)
            await tidy.look_once()
            assert long.book.all() == []
        assert await uploads_in_the_bucket(s3, "left/") == []


async def test_a_file_that_is_gone_in_the_middle_is_told_as_that(s3, tmp_path):
    async with a_process(tmp_path) as long:
        with pytest.raises((StorageFailed, OSError)):
            await put(long, settings(s3, s3.endpoint_url), tmp_path / "nothing.bin", "gone/film.bin", "")

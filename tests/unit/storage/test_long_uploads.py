"""What servers of S3's protocol do that the tests' own server does not: pages of parts, an error under 200, rights."""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from anyio.lowlevel import checkpoint

from comfyfleet.clock import SystemClock
from comfyfleet.ids import SeededIds
from comfyfleet.sealing import Sealer
from comfyfleet.settings.storage import S3Settings
from comfyfleet.storage.base import StorageFailed
from comfyfleet.storage.long_uploads import PART_BYTES, long_uploads, part_bytes
from comfyfleet.storage.upload_book import OpenUpload, UploadBook

pytestmark = pytest.mark.anyio

KEY = "job-1/a film.bin"
NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class QuickClock(SystemClock):
    """Waits between attempts are no test's concern."""

    async def sleep(self, seconds: float) -> None:
        await checkpoint()


@dataclass
class AServer:
    """One object. Parts are kept by number; `refuses` and `fails_at_the_end` say how it misbehaves."""

    parts: dict[int, bytes] = field(default_factory=dict)
    page: int = 1000
    refuses: str = ""
    fails_at_the_end: int = 0
    forgets_at_the_end: bool = False
    sent: list[int] = field(default_factory=list)
    began: int = 0
    content: bytes | None = None
    base_url: str = ""

    async def handle(self, request: web.Request) -> web.Response:
        query = request.query
        if request.method == "POST" and "uploads" in query:
            self.began += 1
            self.parts = {}
            return self.answer("InitiateMultipartUploadResult", f"<UploadId>upload-{self.began}</UploadId>")
        if request.method == "PUT":
            number, data = int(query["partNumber"]), await request.content.read()
            assert request.headers["x-amz-content-sha256"] == hashlib.sha256(data).hexdigest()
            self.sent.append(number)
            self.parts[number] = data
            return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        if request.method == "GET":
            return self.listed(int(query["part-number-marker"]))
        if request.method == "DELETE":
            return web.Response(status=204)
        return self.end()

    def listed(self, marker: int) -> web.Response:
        if self.refuses == "listing":
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        numbers = [number for number in sorted(self.parts) if number > marker]
        rows = "".join(
            f"<Part><PartNumber>{number}</PartNumber><Size>{len(self.parts[number])}</Size>"
            f"<ETag>&quot;{hashlib.md5(self.parts[number]).hexdigest()}&quot;</ETag></Part>"
            for number in numbers[: self.page]
        )
        is_cut = len(numbers) > self.page
        following = f"<NextPartNumberMarker>{numbers[self.page - 1]}</NextPartNumberMarker>" if is_cut else ""
        return self.answer("ListPartsResult", f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>{following}{rows}")

    def end(self) -> web.Response:
        if self.fails_at_the_end:
            self.fails_at_the_end -= 1
            return self.answer("Error", "<Code>InternalError</Code>")  # under 200, as AWS does
        if self.forgets_at_the_end:
            self.content = b"".join(self.parts[number] for number in sorted(self.parts))
            return web.Response(status=404, text="<Error><Code>NoSuchUpload</Code></Error>")
        self.content = b"".join(self.parts[number] for number in sorted(self.parts))
        return self.answer("CompleteMultipartUploadResult", "<ETag>x</ETag>")

    def answer(self, name: str, inner: str) -> web.Response:
        return web.Response(text=f'<?xml version="1.0"?><{name} {NAMESPACE}>{inner}</{name}>')


@dataclass
class AnUpload:
    """The file, and a process that puts it."""

    server: AServer
    path: Path
    content: bytes
    folder: Path

    async def put(self) -> None:
        clock, sha256 = QuickClock(), hashlib.sha256(self.content).hexdigest()
        settings = S3Settings(
            bucket="outputs", access_key_id="key", secret_access_key="secret", endpoint_url=self.server.base_url
        )
        book = UploadBook(self.folder / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
        async with long_uploads(book, clock, SeededIds(1)) as long:
            if self.server.parts:  # what a former process left
                book.add(
                    OpenUpload(
                        settings=settings, key=KEY, upload_id="upload-0", sha256=sha256, guarded=False, began_at=0.0
                    )
                )

            async def is_there() -> bool:
                return self.server.content == self.content

            await long.put(
                self.path,
                KEY,
                size=len(self.content),
                sha256=sha256,
                headers={},
                settings=settings,
                guarded=False,
                is_there=is_there,
            )
            assert book.all() == []


@asynccontextmanager
async def an_upload(folder: Path, server: AServer):
    runner = web.ServerRunner(web.Server(server.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    content = b"".join(bytes([number]) * PART_BYTES for number in range(4)) + b"end"
    path = folder / "film.bin"
    path.write_bytes(content)
    try:
        yield AnUpload(server=server, path=path, content=content, folder=folder)
    finally:
        await runner.cleanup()


def part(number: int) -> bytes:
    return bytes([number - 1]) * PART_BYTES


async def test_parts_are_read_from_every_page_of_the_list(tmp_path):
    async with an_upload(tmp_path, AServer(parts={1: part(1), 2: part(2), 4: part(4)}, page=1)) as upload:
        await upload.put()

    assert sorted(upload.server.sent) == [3, 5]
    assert upload.server.content == upload.content


async def test_keys_that_may_not_list_begin_again(tmp_path):
    async with an_upload(tmp_path, AServer(parts={1: part(1)}, refuses="listing")) as upload:
        await upload.put()

    assert (upload.server.began, sorted(upload.server.sent)) == (1, [1, 2, 3, 4, 5])
    assert upload.server.content == upload.content


async def test_an_error_under_200_is_none_the_less_an_error(tmp_path):
    async with an_upload(tmp_path, AServer(fails_at_the_end=2)) as upload:
        await upload.put()

    assert (upload.server.began, len(upload.server.sent)) == (1, 5)
    assert upload.server.content == upload.content


async def test_an_end_whose_answer_was_lost_is_not_taken_for_a_failure(tmp_path):
    async with an_upload(tmp_path, AServer(forgets_at_the_end=True)) as upload:
        await upload.put()

    assert (upload.server.began, len(upload.server.sent)) == (1, 5)


async def test_a_server_that_never_ends_well_is_given_up_and_kept_in_the_book(tmp_path):
    async with an_upload(tmp_path, AServer(fails_at_the_end=1000)) as upload:
        with pytest.raises(StorageFailed):
            await upload.put()

    book = UploadBook(tmp_path / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
    assert [one.upload_id for one in book.all()] == ["upload-1"]
    book.close()


def test_a_file_of_any_size_has_at_most_ten_thousand_parts():
    for size in (1, PART_BYTES, 10_000 * PART_BYTES, 10_000 * PART_BYTES + 1, 5 * 2**40):
        assert -(-size // part_bytes(size)) <= 10_000
        assert part_bytes(size) >= PART_BYTES


def test_nobody_reads_the_keys_to_a_bucket_out_of_the_file(tmp_path):
    book = UploadBook(tmp_path / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
    settings = S3Settings(bucket="outputs", access_key_id="key", secret_access_key="very-secret")
    book.add(OpenUpload(settings=settings, key=KEY, upload_id="u", sha256="", guarded=False, began_at=0.0))
    book.close()

    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"very-secret" not in kept
    assert (tmp_path / "uploads.sqlite3").stat().st_mode & 0o777 == 0o600
    other = UploadBook(tmp_path / "uploads.sqlite3", Sealer(b"x" * 32, "uploads"))
    assert other.all() == []
    other.close()

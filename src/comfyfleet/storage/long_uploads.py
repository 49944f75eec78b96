"""A file of many parts, sent so that nothing that arrived travels twice: not after a broken connection, nor after the
end of this process.

An upload is written into the book before its first part. A later `put` of the same file under the same key finds it
there, asks the server which parts it has, and sends the others. A part counts as there only if its size and MD5 are
those of the file's own bytes; a server that has forgotten the upload gets it afresh. `abort` is for those that nobody
will go on with (`worker.stages.tidy_uploads` decides).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.settings.storage import S3Settings
from comfyfleet.storage.base import StorageFailed
from comfyfleet.storage.s3_parts import S3Parts, SentPart, UploadGone
from comfyfleet.storage.upload_book import OpenUpload, UploadBook

log = structlog.get_logger()

PART_BYTES = 5 * 1024 * 1024  # the least that S3 takes
PARTS_AT_ONCE = 3
_MOST_PARTS = 10_000
_ROUNDS = 3  # how often an upload that the server forgot is begun again
_KEPT_CLIENTS = 64


class LongUploads:
    """All long uploads of one process; made by `long_uploads`. tunnel_url: the guard before strangers' endpoints."""

    def __init__(
        self, session: aiohttp.ClientSession, book: UploadBook, clock: Clock, ids: Ids, *, tunnel_url: str
    ) -> None:
        self.book = book
        self._clock = clock
        self._tunnel_url = tunnel_url
        # One that is dropped has nothing to close: the session is everybody's.
        self._clients = lru_cache(maxsize=_KEPT_CLIENTS)(partial(S3Parts, session=session, clock=clock, ids=ids))

    async def put(
        self,
        path: Path,
        key: str,
        *,
        size: int,
        sha256: str,
        headers: Mapping[str, str],
        settings: S3Settings,
        guarded: bool,
        is_there: Callable[[], Awaitable[bool]],
    ) -> None:
        """Make `key` hold the file. Raises StorageFailed, OSError.

        sha256: "" when it is not known; then nothing is taken up. is_there: whether the object is whole already, asked
        before the first part and when the server knows the upload no more: the answer to its end may have been lost.
        """
        calls = self._calls(settings, guarded)
        for _ in range(_ROUNDS):
            if await is_there():
                left = await anyio.to_thread.run_sync(self.book.find, settings, key)
                if left is not None:
                    await self.forget(left)
                return
            upload, there = await self._begun(calls, key, sha256, headers, settings, guarded)
            try:
                etags = await _Sending(calls, upload, path, size, there).run()
                await calls.finish(key, upload.upload_id, enumerate(etags, start=1))
            except UploadGone:
                await self.forget(upload)
                continue
            await self.forget(upload)
            return
        raise StorageFailed("upload to S3 failed: the server forgets it before it ends")

    async def abort(self, upload: OpenUpload) -> None:
        """Let the server drop its parts. Raises StorageFailed when it did not hear of it."""
        try:
            await self._calls(upload.settings, upload.guarded).abort(upload.key, upload.upload_id)
        except UploadGone:
            log.debug("upload.gone", key=upload.key)
        await self.forget(upload)

    async def forget(self, upload: OpenUpload) -> None:
        await anyio.to_thread.run_sync(self.book.remove, upload)

    async def _begun(
        self, calls: S3Parts, key: str, sha256: str, headers: Mapping[str, str], settings: S3Settings, guarded: bool
    ) -> tuple[OpenUpload, dict[int, SentPart]]:
        """The upload to go on with and the parts it has; a new one where there is none of this very file."""
        left = await anyio.to_thread.run_sync(self.book.find, settings, key)
        if left is not None:
            try:
                if sha256 and left.sha256 == sha256:
                    return left, await calls.sent(key, left.upload_id)
                await calls.abort(key, left.upload_id)
            except UploadGone:
                log.debug("upload.gone", key=key)
            except StorageFailed as problem:  # keys that may write but not list, say
                log.info("upload.not_resumed", key=key, why=str(problem))
        upload = OpenUpload(
            settings=settings,
            key=key,
            upload_id=await calls.begin(key, headers=headers),
            sha256=sha256,
            guarded=guarded,
            began_at=self._clock.now(),
        )
        await anyio.to_thread.run_sync(self.book.add, upload)
        return upload, {}

    def _calls(self, settings: S3Settings, guarded: bool) -> S3Parts:
        return self._clients(settings, proxy_url=self._tunnel_url if guarded else "")


@asynccontextmanager
async def long_uploads(book: UploadBook, clock: Clock, ids: Ids, *, tunnel_url: str = "") -> AsyncIterator[LongUploads]:
    """Ready until the block ends, which closes the book too."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    try:
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            yield LongUploads(session, book, clock, ids, tunnel_url=tunnel_url)
    finally:
        book.close()


class _Sending:
    """The parts of one file on their way, a few side by side: memory is a few parts whatever the size."""

    def __init__(self, calls: S3Parts, upload: OpenUpload, path: Path, size: int, there: dict[int, SentPart]) -> None:
        self._calls = calls
        self._upload = upload
        self._path = path
        self._size = size
        self._there = there
        self._part_bytes = part_bytes(size)
        self._etags = [""] * -(-size // self._part_bytes)
        self._todo = iter(range(1, len(self._etags) + 1))
        self._failure: Exception | None = None
        self._sent = 0

    async def run(self) -> list[str]:
        """Every part's ETag, in order. Raises UploadGone, StorageFailed, OSError."""
        async with anyio.create_task_group() as lanes:
            for _ in range(min(PARTS_AT_ONCE, len(self._etags))):
                lanes.start_soon(self._lane, lanes.cancel_scope)
        if self._failure is not None:
            raise self._failure
        if self._there:
            log.info("upload.resumed", key=self._upload.key, parts=len(self._etags), sent=self._sent)
        return self._etags

    async def _lane(self, all_lanes: anyio.CancelScope) -> None:
        # One buffer for all parts of a lane: as many new ones would stay, a little of each, in every thread's heap.
        buffer = memoryview(bytearray(min(self._part_bytes, self._size)))
        try:
            for number in self._todo:
                self._etags[number - 1] = await self._part(number, buffer)
        except (StorageFailed, OSError) as problem:
            self._failure = self._failure or problem
            all_lanes.cancel()

    async def _part(self, number: int, buffer: memoryview) -> str:
        start = (number - 1) * self._part_bytes
        data = buffer[: min(self._part_bytes, self._size - start)]
        there = self._there.get(number)
        is_like = there is not None and there.size == len(data)
        sha256, md5 = await anyio.to_thread.run_sync(_read, self._path, start, data, is_like)
        if there is not None and md5 == there.etag:
            return md5
        self._sent += 1
        return await self._calls.send(self._upload.key, self._upload.upload_id, number, data, sha256)


def part_bytes(size: int) -> int:
    """The size of a file's parts: the least, unless that would be more parts than S3 takes. Of the size alone, so that
    a later process cuts the file at the same places."""
    mebibyte = 1024 * 1024
    return max(PART_BYTES, -(-size // (_MOST_PARTS * mebibyte)) * mebibyte)


def _read(path: Path, start: int, data: memoryview, is_like: bool) -> tuple[str, str]:
    """Fill `data` with the file's bytes from `start` on; their SHA-256, and where asked for their MD5, which is what S3
    calls a part. Blocking; raises OSError."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        filled = 0
        while filled < len(data):  # one read gives at most what a signal lets it
            count = file.readinto(data[filled:])
            if not count:
                raise StorageFailed("upload to S3 failed: the file became shorter")
            filled += count
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest() if is_like else ""
    return hashlib.sha256(data).hexdigest(), md5

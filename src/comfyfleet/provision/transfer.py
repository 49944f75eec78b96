"""Bring the bytes of one file from one source into its staged file, with their digest. Checks and names are not here.

The first missing chunk is fetched alone: its answer tells size, validator and whether the server knows ranges. The
others are handed out in order to a few connections, one chunk at a time. What breaks off goes on where it stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import anyio
import anyio.to_thread
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.provision.checks import RunningDigest
from comfyfleet.provision.chunks import CHUNK_BYTES, Chunk, Identity, Ledger
from comfyfleet.provision.progress import FileProgress
from comfyfleet.provision.ranges import Answer, Remote, SourceChanged, Transient
from comfyfleet.provision.staging import Staged, disk_full, free_bytes
from comfyfleet.provision.template import ModelFile
from comfyfleet.retry import TRANSFER, Backoff
from comfyfleet.wire.errors import FleetError, ProvisionFailed

log = structlog.get_logger()

Result = TypeVar("Result")

_WRITE_BYTES = 2**20
_MIN_PROGRESS_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class TransferLimits:
    """slow_bytes_per_s: below this over slow_window_s, a connection is given up for a new one. reserve: stays free."""

    chunk_bytes: int = CHUNK_BYTES
    connections: int = 4
    idle_s: float = 30.0
    slow_bytes_per_s: float = 16_384.0
    slow_window_s: float = 20.0
    reserve_bytes: int = 512 * 10**6
    backoff: Backoff = TRANSFER


@dataclass(frozen=True, kw_only=True)
class Received:
    """sha256: of what arrived. published_sha256: what the source said it would be, or ""."""

    sha256: str
    published_sha256: str


@dataclass(kw_only=True)
class _Cursor:
    """How far one chunk is, across connections that broke off."""

    chunk: Chunk
    offset: int


class Transfer:
    """One attempt with one source. Raises ProvisionFailed, SourceChanged or DiskFull; what arrived stays staged."""

    def __init__(
        self,
        remote: Remote,
        model: ModelFile,
        file: Staged,
        progress: FileProgress,
        *,
        limits: TransferLimits,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._remote = remote
        self._model = model
        self._file = file
        self._progress = progress
        self._limits = limits
        self._clock = clock
        self._ids = ids
        self._first: _Cursor | None = None

    async def run(self) -> Received:
        ledger = self._file.ledger
        offer = Identity(size_bytes=0)
        if ledger is None or ledger.missing:
            offer = await self._persist(self._begin, lambda: self._progress.fetched_bytes)
        ledger = self._file.ledger
        if ledger is None:  # no ranges: it came in one piece

            async def never() -> None:
                raise SourceChanged

            digest = await RunningDigest(self._file.fd).follow(lambda: offer.size_bytes, never, offer.size_bytes)
            return Received(sha256=digest, published_sha256=offer.sha256)
        self._progress.size_bytes, self._progress.done_bytes = ledger.identity.size_bytes, ledger.done_bytes
        return Received(sha256=await self._fill(ledger, offer), published_sha256=ledger.identity.sha256)

    async def _begin(self) -> Identity:
        """The first missing chunk as far as it comes, or all where there are no ranges; what the source offers."""
        ledger = self._file.ledger
        start, end = 0, self._limits.chunk_bytes
        if ledger is not None:
            start, end = ledger.missing[0].start, ledger.missing[0].end
        async with self._remote.open(start, end) as answer:
            offer = answer.identity
            self._check(offer)
            self._progress.size_bytes = offer.size_bytes
            if not answer.is_partial:
                return await self._whole(answer)
            wanted = Identity(size_bytes=offer.size_bytes, etag=offer.etag, sha256=self._model.sha256 or offer.sha256)
            if ledger is None:
                self._check_room(offer.size_bytes)
                ledger = self._file.begin(wanted, chunk_bytes=self._limits.chunk_bytes)
            elif not wanted.continues(ledger.identity):
                raise SourceChanged
            self._progress.done_bytes = ledger.done_bytes
            self._first = _Cursor(chunk=ledger.missing[0], offset=ledger.missing[0].start)
            try:
                await self._take(answer, self._first)
            except (aiohttp.ClientError, OSError, TimeoutError, Transient) as trouble:
                # What this answer was for is known; the rest of its chunk is the connections' business.
                log.debug("download.again", file=self._model.name, why=str(trouble))
        return offer

    async def _whole(self, answer: Answer) -> Identity:
        """A body without ranges, from its beginning to its end."""
        self._check_room(answer.identity.size_bytes)
        self._file.forget()
        self._file.empty()
        self._progress.done_bytes = 0
        cursor = _Cursor(chunk=Chunk(number=0, start=0, end=2**62), offset=0)
        await self._take(answer, cursor)
        return Identity(size_bytes=cursor.offset, sha256=answer.identity.sha256)

    async def _fill(self, ledger: Ledger, offer: Identity) -> str:
        """All missing chunks, and the digest of the whole."""
        waiting = deque(_Cursor(chunk=chunk, offset=chunk.start) for chunk in ledger.missing)
        if self._first is not None and waiting:
            waiting[0] = self._first
        digest = ""

        async def connection() -> None:
            while waiting:
                cursor = waiting.popleft()
                if cursor.offset < cursor.chunk.end:
                    await self._persist(lambda: self._rest_of(cursor, offer), lambda: cursor.offset)  # noqa: B023
                ledger.add(cursor.chunk)
                if ledger.wants_sync:
                    await anyio.to_thread.run_sync(ledger.sync)

        async def hashing() -> None:
            nonlocal digest
            running = RunningDigest(self._file.fd)
            digest = await running.follow(ledger.prefix_bytes, ledger.until_changed, ledger.identity.size_bytes)

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(hashing, name="digest")
                for number in range(min(self._limits.connections, len(waiting))):
                    group.start_soon(connection, name=f"connection {number}")
        except* (FleetError, SourceChanged, OSError) as several:
            raise _first(several) from several
        return digest

    async def _rest_of(self, cursor: _Cursor, offer: Identity) -> None:
        async with self._remote.open(cursor.offset, cursor.chunk.end, known=offer) as answer:
            await self._take(answer, cursor)
        if cursor.offset < cursor.chunk.end:
            raise Transient("the answer was shorter than asked for")

    async def _take(self, answer: Answer, cursor: _Cursor) -> None:
        """Write what comes at the cursor, up to the chunk's end. What arrived before a cut is kept."""
        pending: list[bytes] = []
        held = 0

        async def flush() -> None:
            nonlocal held
            blocks = _cut(pending, cursor.chunk.end - cursor.offset)
            pending.clear()
            held = 0
            count = await self._file.write(blocks, cursor.offset)
            cursor.offset += count
            self._progress.done_bytes += count
            self._progress.fetched_bytes += count

        since, came = self._clock.monotonic(), 0
        try:
            async for block in answer.blocks:
                pending.append(block)
                came += len(block)
                held += len(block)
                if held >= _WRITE_BYTES:
                    await flush()
                now = self._clock.monotonic()
                if now - since >= self._limits.slow_window_s:
                    if came < self._limits.slow_bytes_per_s * (now - since):
                        raise Transient(f"only {came} bytes came in {now - since:.0f} s")
                    since, came = now, 0
        except (aiohttp.ClientError, OSError, TimeoutError, Transient):
            await flush()
            raise
        await flush()

    async def _persist(self, step: Callable[[], Awaitable[Result]], position: Callable[[], int]) -> Result:
        """Repeat `step` after Transient; as many failures as the policy has, without progress between, are the end."""
        delays, reached = self._limits.backoff.delays(self._ids), position()
        while True:
            try:
                return await step()
            except Transient as trouble:
                if position() - reached >= _MIN_PROGRESS_BYTES:
                    delays, reached = self._limits.backoff.delays(self._ids), position()
                wait_s = next(delays, None)
                if wait_s is None:
                    raise ProvisionFailed(f"gave up: {trouble}", reason="source") from trouble
                log.debug("download.again", file=self._model.name, why=str(trouble), wait_s=round(wait_s, 1))
            await self._clock.sleep(wait_s)

    def _check(self, offer: Identity) -> None:
        """Refuse a source before its bytes are taken. Raises ProvisionFailed."""
        wanted = self._model
        if wanted.size_bytes is not None and offer.size_bytes and offer.size_bytes != wanted.size_bytes:
            raise ProvisionFailed(
                f"the source has {offer.size_bytes} bytes, not {wanted.size_bytes} as the template says", reason="size"
            )
        if wanted.sha256 is not None and offer.sha256 and offer.sha256 != wanted.sha256:
            raise ProvisionFailed("the source's SHA-256 is not the template's", reason="sha256")

    def _check_room(self, needed_bytes: int) -> None:
        free = free_bytes(self._file.target.parent)
        if needed_bytes + self._limits.reserve_bytes > free:
            raise disk_full(self._file.target, needed_bytes, free, self._limits.reserve_bytes)


def _cut(blocks: list[bytes], limit: int) -> list[bytes]:
    """The blocks' first `limit` bytes: a server may send more than it was asked for."""
    kept = []
    for block in blocks:
        kept.append(block[:limit])
        limit -= len(kept[-1])
    return [block for block in kept if block]


def _first(group: BaseExceptionGroup[FleetError | SourceChanged | OSError]) -> FleetError | SourceChanged | OSError:
    """One failure stands for those that it caused in its neighbours."""
    one = group.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one

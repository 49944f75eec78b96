"""`POST /upload`: files for later jobs, by content. Multipart, written to disk as it arrives, never whole in memory.

The answer has ComfyUI's `name, subfolder, type`, and `value`: what goes into the graph. The same bytes give the same
name, whoever sends them; what is not used for a while may be dropped (see `stages.input_store`).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import anyio
import anyio.to_thread
import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from comfyfleet.wire.errors import BadRequest, PayloadTooLarge, room_on_disk
from comfyfleet.worker.stages.input_store import FOLDER, InputFile, InputStore
from comfyfleet.worker.stages.media import sniffed_type

MAX_FILES = 64
_MAX_HEADER_BYTES = 4096


class UploadedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One stored file. `value` is what a Load node's input takes."""

    name: str
    subfolder: str
    type: str
    value: str
    filename: str
    mime: str
    sha256: str
    size_bytes: int


@dataclass(kw_only=True)
class _Part:
    """A file part that is being written."""

    file: BinaryIO
    draft: Path
    filename: str
    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class Upload:
    """Takes one body. `max_bytes` bounds all its files together."""

    def __init__(self, store: InputStore, *, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._total = 0
        self._ended = False
        self._header: list[bytes] = [b"", b""]
        self._headers: dict[bytes, bytes] = {}
        self._part: _Part | None = None
        self._opened: list[_Part] = []
        self._pending: list[tuple[_Part, bytes]] = []

    async def receive(self, body: AsyncIterator[bytes], content_type: str) -> list[UploadedFile]:
        """Store every file of the body. Raises BadRequest or PayloadTooLarge, and then keeps none."""
        try:
            parser = self._parser(content_type)
            async for chunk in body:
                with room_on_disk():
                    parser.write(chunk)
                    await self._write()
            parser.finalize()
            if not self._ended:
                raise BadRequest("the multipart body ends before its last boundary")
            if not self._opened:
                raise BadRequest("the body holds no file")
            return await anyio.to_thread.run_sync(self._keep)
        except FormParserError as problem:
            raise BadRequest("the multipart body is malformed") from problem
        finally:
            for part in self._opened:
                part.file.close()
                self._store.drop(part.draft)

    def _parser(self, content_type: str) -> MultipartParser:
        kind, options = parse_options_header(content_type.encode("latin-1", "replace"))
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise BadRequest("send multipart/form-data with the file in a field", header="Content-Type")
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header_piece(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._header_piece(1, data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": lambda data, start, end: self._data(data[start:end]),
                "on_end": self._end,
            },
        )

    def _end(self) -> None:
        self._ended = True

    def _begin(self) -> None:
        self._headers, self._part = {}, None

    def _header_piece(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > _MAX_HEADER_BYTES:
            raise BadRequest("a part's header is too long")

    def _header_end(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = [b"", b""]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"filename")
        if name is None:
            return  # a plain field, as ComfyUI's own form has them: not for us
        if len(self._opened) >= MAX_FILES:
            raise BadRequest(f"more than {MAX_FILES} files")
        file, draft = self._store.draft()
        self._part = _Part(file=file, draft=draft, filename=name.decode("utf-8", "replace")[-200:])
        self._opened.append(self._part)

    def _data(self, data: bytes) -> None:
        if self._part is None:
            return
        self._total += len(data)
        if self._total > self._max_bytes:
            raise PayloadTooLarge(f"the files have over {self._max_bytes} bytes")
        self._pending.append((self._part, data))

    async def _write(self) -> None:
        """Write what the parser found in the last chunk, off the event loop."""
        pending, self._pending = self._pending, []
        if pending:
            await anyio.to_thread.run_sync(_append, pending)

    def _keep(self) -> list[UploadedFile]:
        found = []
        for part in self._opened:
            part.file.close()
            mime = sniffed_type(part.draft)
            suffix = PurePosixPath(part.filename.replace("\\", "/")).suffix
            kept = self._store.keep(part.draft, sha256=part.digest.hexdigest(), suffix=suffix)
            found.append(_answer(kept, part.filename, mime))
        return found


def _append(pending: list[tuple[_Part, bytes]]) -> None:
    for part, data in pending:
        part.file.write(data)
        part.digest.update(data)
        part.size += len(data)


def _answer(kept: InputFile, filename: str, mime: str) -> UploadedFile:
    return UploadedFile(
        name=kept.path.name,
        subfolder=FOLDER,
        type="input",
        value=kept.name,
        filename=filename,
        mime=mime,
        sha256=kept.sha256,
        size_bytes=kept.size_bytes,
    )

"""From what the engine wrote to what the caller gets: files kept under the request's id, described, and linked to.

The engine's own files are linked or copied, never moved. A store that is slow or down costs that output its remote
copy (`upload_error`), not the job: the file stays here and its link leads here. Files stream; hashing and looking
into media run in threads, a few at a time.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from comfyfleet.storage.base import Storage, StorageFailed
from comfyfleet.storage.drafts import Drafts
from comfyfleet.storage.local import LocalStorage
from comfyfleet.storage.long_uploads import PART_BYTES
from comfyfleet.wire.errors import DiskFull, room_on_disk
from comfyfleet.wire.generation import GenerateInput, OutputEntry, S3Target
from comfyfleet.worker.stages.destinations import Destinations
from comfyfleet.worker.stages.history_files import Made, NamedFile, located
from comfyfleet.worker.stages.keep_file import POSTER_SUFFIX, StoredFile, is_quick, keep, poster_path

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Where:
    """From and to, for all files of one job."""

    folders: Mapping[str, Path]
    copy: bool
    remote: Storage | None
    is_own_store: bool  # the request's, not the operator's
    expires_in_s: float


class StoreOutputs:
    """The stage; one for the whole process, so that its limits hold over all jobs."""

    def __init__(
        self,
        local: LocalStorage,
        drafts: Drafts,
        destinations: Destinations,
        *,
        url_expires_s: float,
        base64_max_bytes: int,
    ) -> None:
        self._local = local
        self._drafts = drafts
        self._destinations = destinations
        self._url_expires_s = url_expires_s
        self._base64_max_bytes = base64_max_bytes
        self._threads = anyio.CapacityLimiter(4)
        # Lanes by whose store it is and whether the file is long: a stranger's slow bucket, or a gigabyte on its way,
        # holds up its like and nobody else. Long ones go one by one, in parts side by side: memory stays flat.
        self._lanes = {
            (is_own, is_long): anyio.CapacityLimiter(1 if is_long else 16)
            for is_own in (False, True)
            for is_long in (False, True)
        }

    async def run(
        self, made: Made, *, request_id: str, request: GenerateInput, folders: Mapping[str, Path]
    ) -> list[OutputEntry]:
        """Every file that a prompt made, in its order. `folders`: the engine's, by type: output, temp, input.

        Raises DiskFull; every other trouble of one file stands on its entry (`error`, `upload_error`).
        """
        named = made.files
        keys = storage_keys(named, request_id)
        outputs = [
            OutputEntry(
                filename=one.filename.replace("\\", "/").rsplit("/", 1)[-1],
                local_path=self._local.place_of(key) if key else "",
                type=one.type,
                subfolder=one.subfolder,
                node_id=one.node_id,
                output_type=one.output_type,
                text=one.text,
            )
            for one, key in zip(named, keys, strict=True)
        ]
        remote, refused = self._open(request.s3)
        where = _Where(
            folders=folders,
            copy=made.is_in_place,
            remote=remote,
            is_own_store=bool(request.s3.endpoint_url),
            expires_in_s=self._expiry(request),
        )
        full: list[DiskFull] = []
        for output in outputs:
            output.upload_error = refused
        if len(outputs) == 1:
            await self._store_one(outputs[0], named[0], keys[0], where, full)
        else:
            async with anyio.create_task_group() as files:
                for output, one, key in zip(outputs, named, keys, strict=True):
                    files.start_soon(self._store_one, output, one, key, where, full)
        if full:
            raise full[0]
        if request.return_outputs_as_base64:
            await self._attach_base64(outputs)
        return outputs

    def is_long_way(self, made: Made, *, request: GenerateInput, folders: Mapping[str, Path]) -> bool:
        """Will some file be long under way to a store? Blocking, for as long as a look at each file takes."""
        if self._open(request.s3)[0] is None:
            return False
        sources = (located(one, folders) for one in made.files)
        return any(os.path.getsize(one) > PART_BYTES for one in sources if one is not None and os.path.isfile(one))

    async def resign(self, outputs: Sequence[OutputEntry], *, request: GenerateInput) -> None:
        """New links, in place, for a result that is read later."""
        remote, _ = self._open(request.s3)
        expires_in_s = self._expiry(request)
        for output in outputs:
            key = self._key_of(output)
            if key and output.size_bytes is not None:
                await self._link(output, key, None if output.upload_error else remote, expires_in_s)

    def _open(self, target: S3Target) -> tuple[Storage | None, str]:
        try:
            return self._destinations.open(target), ""
        except StorageFailed as problem:
            return None, str(problem)

    async def _store_one(
        self,
        output: OutputEntry,
        named: NamedFile,
        key: str,
        where: _Where,
        full: list[DiskFull],
    ) -> None:
        source, remote = located(named, where.folders), where.remote
        if not key or (source is None and named.text is None):
            output.error = "the node named a file outside the engine's folders"
            output.upload_error = ""
            return
        target = output.local_path
        try:
            with room_on_disk():
                keeping = partial(
                    keep,
                    source,
                    named.text,
                    target,
                    folder=where.folders.get(named.type),
                    drafts=self._drafts,
                    copy=where.copy,
                )
                if is_quick(source):
                    stored = keeping()
                else:
                    stored = await anyio.to_thread.run_sync(keeping, limiter=self._threads, abandon_on_cancel=True)
        except DiskFull as problem:
            full.append(problem)
            return
        except OSError:
            output.error = "the file that the node named is not there"
            output.upload_error = ""
            return
        _describe(output, stored)
        if remote is not None:
            try:
                async with self._lanes[where.is_own_store, stored.size_bytes > PART_BYTES]:
                    await remote.put(Path(target), key, media_type=stored.facts.mime, sha256=stored.sha256)
                    if stored.has_poster:
                        await remote.put(Path(poster_path(target)), key + POSTER_SUFFIX, media_type="image/jpeg")
            except StorageFailed as problem:
                output.upload_error, remote = str(problem), None
            except Exception:  # the stage boundary: a store's own bug costs the upload, not the job
                log.exception("upload.crashed", key=key)
                output.upload_error, remote = "the upload failed", None
        if stored.has_poster:
            output.poster_url = "poster"  # `_link` writes the real one
        await self._link(output, key, remote, where.expires_in_s)

    async def _link(self, output: OutputEntry, key: str, remote: Storage | None, expires_in_s: float) -> None:
        store = remote or self._local
        try:
            signed = await store.url(key, expires_in_s=expires_in_s)
            output.url, output.url_expires_at = signed.url, signed.expires_at
            if output.poster_url:
                output.poster_url = (await store.url(key + POSTER_SUFFIX, expires_in_s=expires_in_s)).url
        except StorageFailed as problem:
            output.upload_error = str(problem)

    async def _attach_base64(self, outputs: Sequence[OutputEntry]) -> None:
        left = self._base64_max_bytes
        for output in outputs:
            if output.error or output.size_bytes is None:
                continue
            if output.size_bytes > left:
                output.error = f"not given as base64: over the limit of {self._base64_max_bytes} bytes for one answer"
                continue
            left -= output.size_bytes
            data = await anyio.to_thread.run_sync(Path(output.local_path).read_bytes)
            output.data = base64.b64encode(data).decode()
            output.mimetype = output.mime

    def _expiry(self, request: GenerateInput) -> float:
        asked = (request.expires_s, request.s3.expires_s)
        return next((seconds for seconds in asked if seconds > 0), self._url_expires_s)

    def _key_of(self, output: OutputEntry) -> str:
        """The key that an entry was stored under, from its local path."""
        try:
            return Path(output.local_path).relative_to(self._local.root).as_posix() if output.local_path else ""
        except ValueError:
            return ""


def storage_keys(named: Sequence[NamedFile], request_id: str) -> list[str]:
    """`<request_id>/<sub-folders>/<name>` for each, "" for a name that leaves its folder; two files never share one."""
    owner: dict[str, tuple[str, str, str | None]] = {}
    keys = []
    for index, one in enumerate(named):
        relative = one.path
        if relative is None:
            keys.append("")
            continue
        what = (one.type, one.as_named, one.text)
        # A temp file may have an output file's name; then its type, and at last its place, tells them apart.
        for middle in ("", f"{one.type}/" if one.type.isalnum() else f"{index}/", f"{index}/"):
            key = f"{request_id}/{middle}{relative}"
            if owner.setdefault(key, what) == what:
                break
        keys.append(key)
    return keys


def _describe(output: OutputEntry, stored: StoredFile) -> None:
    facts = stored.facts
    output.kind, output.mime = facts.kind, facts.mime
    output.size_bytes, output.sha256 = stored.size_bytes, stored.sha256
    output.duration_s, output.width, output.height = facts.duration_s, facts.width, facts.height
    output.fps, output.frames = facts.fps, facts.frames
    output.channels, output.sample_rate = facts.channels, facts.sample_rate
    output.peaks = stored.peaks

"""From what the engine wrote to what the caller gets: files kept under the request's id, described, and linked to.

The engine's own files are linked or copied, never moved. A store that is slow or down costs that output its remote
copy (`upload_error`), not the job: the file stays here and its link leads here. Files stream; hashing and looking
into media run in threads, a few at a time.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog

from comfyfleet.storage.base import Storage, StorageFailed
from comfyfleet.storage.local import LocalStorage, place, place_bytes
from comfyfleet.storage.s3 import PART_BYTES
from comfyfleet.wire.errors import DiskFull, room_on_disk
from comfyfleet.wire.generation import GenerateInput, OutputEntry, S3Target
from comfyfleet.worker.stages.destinations import Destinations
from comfyfleet.worker.stages.history_files import NamedFile, located, named_files, relative_path, writes_in_place
from comfyfleet.worker.stages.media import MediaFacts, media_facts, peaks, poster

log = structlog.get_logger()

POSTER_SUFFIX = ".poster.jpg"
# Below this, copying costs less than the care that a shared inode needs.
COPY_BELOW_BYTES = 4 * 1024 * 1024
_QUICK_BYTES = 128 * 1024
_QUICK_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_HASH_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class _Stored:
    size_bytes: int
    sha256: str
    facts: MediaFacts
    has_poster: bool
    peaks: list[float] | None


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
        self, local: LocalStorage, destinations: Destinations, *, url_expires_s: float, base64_max_bytes: int
    ) -> None:
        self._local = local
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
        self, entry: Mapping[str, Any], *, request_id: str, request: GenerateInput, folders: Mapping[str, Path]
    ) -> list[OutputEntry]:
        """Every file that the history entry names, in its order. `folders`: the engine's, by type: output, temp, input.

        Raises DiskFull; every other trouble of one file stands on its entry (`error`, `upload_error`).
        """
        named = named_files(entry)
        copy = writes_in_place(entry)
        keys = storage_keys(named, request_id)
        outputs = [
            OutputEntry(
                filename=one.filename.replace("\\", "/").rsplit("/", 1)[-1],
                local_path=str(self._local.path(key)) if key else "",
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
            copy=copy,
            remote=remote,
            is_own_store=bool(request.s3.endpoint_url),
            expires_in_s=self._expiry(request),
        )
        full: list[DiskFull] = []
        async with anyio.create_task_group() as files:
            for output, one, key in zip(outputs, named, keys, strict=True):
                output.upload_error = refused
                if len(outputs) == 1:
                    await self._store_one(output, one, key, where, full)
                else:
                    files.start_soon(self._store_one, output, one, key, where, full)
        if full:
            raise full[0]
        if request.return_outputs_as_base64:
            await self._attach_base64(outputs)
        return outputs

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
        target = self._local.path(key)
        try:
            with room_on_disk():
                keep = partial(_keep, source, named.text, target, where.folders.get(named.type), where.copy)
                if _is_quick(source):
                    stored = keep()
                else:
                    stored = await anyio.to_thread.run_sync(keep, limiter=self._threads, abandon_on_cancel=True)
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
                    await remote.put(target, key, media_type=stored.facts.mime, sha256=stored.sha256)
                    if stored.has_poster:
                        await remote.put(_poster_path(target), key + POSTER_SUFFIX, media_type="image/jpeg")
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
    for one in named:
        relative = relative_path(one)
        if relative is None:
            keys.append("")
            continue
        what = (one.type, str(relative), one.text)
        # A temp file may have an output file's name; then its type, and at last its node, tells them apart.
        for middle in ("", f"{one.type}/", f"node-{one.node_id}/"):
            key = f"{request_id}/{middle}{relative}"
            if owner.setdefault(key, what) == what:
                break
        keys.append(key)
    return keys


def missing_files(entry: Mapping[str, Any], folders: Mapping[str, Path]) -> list[NamedFile]:
    """Files that a history entry names and that are gone: a cached answer that must be rendered again. Blocking."""
    gone = []
    for one in named_files(entry):
        source = located(one, folders)
        if one.text is None and source is not None and not source.is_file():
            gone.append(one)
    return gone


def _is_quick(source: Path | None) -> bool:
    """A picture so small that the way to a thread and back costs more than the work (half a millisecond)."""
    if source is None or source.suffix.lower() not in _QUICK_SUFFIXES:
        return False
    return source.stat().st_size <= _QUICK_BYTES


def _keep(source: Path | None, text: str | None, target: Path, folder: Path | None, copy: bool) -> _Stored:
    """Place one file at `target` and look at it. Blocking; raises OSError."""
    data = text.encode() if text is not None else None
    size = 0
    if data is None and source is not None and folder is not None:
        real, size = _contained(source, folder)
        if size < COPY_BELOW_BYTES:
            data = real.read_bytes()
        else:
            place(real, target, copy)
    if data is not None:  # small: read once, for all that is to be done with it
        place_bytes(data, target)
        size = len(data)
    facts = media_facts(target, data)
    picture = poster(target) if facts.kind == "video" else None
    if picture is not None:
        place_bytes(picture, _poster_path(target))
    return _Stored(
        size_bytes=size,
        sha256=hashlib.sha256(data).hexdigest() if data is not None else _sha256(target),
        facts=facts,
        has_poster=picture is not None,
        peaks=peaks(target, facts.duration_s) if facts.kind == "audio" else None,
    )


def _contained(source: Path, folder: Path) -> tuple[Path, int]:
    """The real file and its size. Raises FileNotFoundError for one that a link leads out of the folder."""
    real = os.path.realpath(source, strict=True)
    facts = os.stat(real)
    if not stat.S_ISREG(facts.st_mode) or not real.startswith(_real_folder(folder)):
        raise FileNotFoundError(source.name)
    return Path(real), facts.st_size


@lru_cache(maxsize=256)
def _real_folder(folder: Path) -> str:
    """The folder's real path with its slash; an engine's folders do not move while it runs."""
    return os.path.join(os.path.realpath(folder), "")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_HASH_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _poster_path(path: Path) -> Path:
    return path.with_name(path.name + POSTER_SUFFIX)


def _describe(output: OutputEntry, stored: _Stored) -> None:
    facts = stored.facts
    output.kind, output.mime = facts.kind, facts.mime
    output.size_bytes, output.sha256 = stored.size_bytes, stored.sha256
    output.duration_s, output.width, output.height = facts.duration_s, facts.width, facts.height
    output.fps, output.frames = facts.fps, facts.frames
    output.channels, output.sample_rate = facts.channels, facts.sample_rate
    output.peaks = stored.peaks

"""From what a request points at to files the engine can load, all of them at once, before it is their turn.

Nothing is fetched by the engine itself. A file is known by its content: two URLs with the same bytes are one file, and
a URL seen before is asked whether it changed (ETag), never assumed to be the same.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from urllib.parse import unquote_to_bytes, urlsplit

import anyio
import anyio.to_thread
from PIL import Image

from comfyfleet.clock import Clock
from comfyfleet.fetching.fetcher import Credential, FetchLimits, GuardedFetcher
from comfyfleet.ids import Ids
from comfyfleet.retry import FETCH
from comfyfleet.storage.base import StorageFailed
from comfyfleet.wire.errors import FleetError, InputUnavailable, WorkflowRefused, room_on_disk
from comfyfleet.wire.file_inputs import FileReference, file_references, plain_names, with_names
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.stages.destinations import Destinations
from comfyfleet.worker.stages.input_store import FOLDER, InputFile, InputStore
from comfyfleet.worker.stages.media import sniffed_type

MAX_FILES = 64
# Where Pillow, which engines load pictures with, begins to call a picture an attack.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
_AT_ONCE = 8
_REMEMBERED_URLS = 1000
_S3_LINK_S = 3600.0
_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.IGNORECASE)
_SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/avif": ".avif",
    "audio/mpeg": ".mp3",
    "audio/wav": ".wav",
    "audio/flac": ".flac",
    "audio/ogg": ".ogg",
    "audio/mp4": ".m4a",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "video/x-matroska": ".mkv",
    "model/gltf-binary": ".glb",
}
# What an input's name promises; a web page in place of a picture is refused here and not by the engine.
_FAMILIES = {"image": "image", "mask": "image", "audio": "audio", "video": "video"}
# A container may hold sound alone, and engines read sound from films.
_FITS = {"image": ("image",), "audio": ("audio", "video"), "video": ("video", "image")}


@dataclass(frozen=True, kw_only=True)
class FetchedInputs:
    """The graph with plain names, and the files behind them, for engines that do not share this folder."""

    graph: Graph
    files: tuple[InputFile, ...]


class FetchInputs:
    """The stage; one for the whole process."""

    def __init__(
        self,
        fetcher: GuardedFetcher,
        store: InputStore,
        destinations: Destinations,
        *,
        max_bytes: int,
        timeout_s: float,
        clock: Clock,
        ids: Ids,
        trusted: GuardedFetcher | None = None,
    ) -> None:
        """trusted: for the store that the operator named, which may be on his own network."""
        self._fetcher = fetcher
        self._trusted = trusted or fetcher
        self._store = store
        self._destinations = destinations
        self._limits = FetchLimits(max_bytes=max_bytes, total_s=timeout_s)
        self._clock = clock
        self._ids = ids
        self._slots = anyio.CapacityLimiter(_AT_ONCE)
        self._seen: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()

    async def run(
        self, graph: Graph, request: GenerateInput, *, uploads: Mapping[str, frozenset[str]] | None = None
    ) -> FetchedInputs:
        """Fetch everything. Raises WorkflowRefused, InputRefused or InputUnavailable naming node and input."""
        references = file_references(graph, uploads)
        uploaded = [one for one in dict.fromkeys(plain_names(graph, uploads)) if one.startswith(f"{FOLDER}/")]
        # An upload is used like a fetched file: marked as in use, and known to engines that do not share the folder.
        kept = [file for name in uploaded if (file := await anyio.to_thread.run_sync(self._store.find, name))]
        if not references:
            return FetchedInputs(graph=graph, files=tuple(kept))
        if len(references) > MAX_FILES:
            raise WorkflowRefused(f"{len(references)} input files, the limit is {MAX_FILES}")
        found: list[InputFile | None] = [None] * len(references)
        failed: list[FleetError] = []

        async with anyio.create_task_group() as fetches:

            async def fetch(index: int, reference: FileReference) -> None:
                try:
                    async with self._slots:
                        found[index] = await self._fetch(reference, request)
                except FleetError as error:
                    failed.append(_placed(error, reference))
                    fetches.cancel_scope.cancel()

            for index, reference in enumerate(references):
                fetches.start_soon(fetch, index, reference)
        if failed:
            raise failed[0]
        await anyio.to_thread.run_sync(self._store.prune)
        named = [(reference, file) for reference, file in zip(references, found, strict=True) if file is not None]
        return FetchedInputs(
            graph=with_names(graph, ((reference, file.name) for reference, file in named)),
            files=(*kept, *(file for _, file in named)),
        )

    async def _fetch(self, reference: FileReference, request: GenerateInput) -> InputFile:
        with room_on_disk():
            if reference.url:
                file = await self._download_patiently(reference, request)
            else:
                file = await anyio.to_thread.run_sync(partial(self._decode, reference))
        await anyio.to_thread.run_sync(_check_kind, file, reference)
        return file

    async def _download_patiently(self, reference: FileReference, request: GenerateInput) -> InputFile:
        """A stumbling host is asked again; one that says no is not."""
        for wait_s in FETCH.delays(self._ids):
            try:
                return await self._download(reference, request)
            except InputUnavailable as problem:
                if not _may_recover(problem):
                    raise
            await self._clock.sleep(wait_s)
        return await self._download(reference, request)

    async def _download(self, reference: FileReference, request: GenerateInput) -> InputFile:
        url, credentials = (
            reference.url,
            [Credential(url_prefix=one.url_prefix, headers=one.headers) for one in request.credentials],
        )
        if reference.headers:
            credentials.append(Credential(url_prefix=url, headers=reference.headers))
        fetcher = self._fetcher
        if url.lower().startswith("s3://"):
            url = await self._s3_link(reference, request)
            if not request.s3.endpoint_url:
                fetcher = self._trusted
        # What one caller's credentials could read, another's may not.
        name = (url, hashlib.sha256(repr(credentials_seen(credentials)).encode()).hexdigest())
        etag, known = self._seen.get(name, ("", ""))
        kept = await anyio.to_thread.run_sync(self._store.find, known) if known else None
        file, draft = await anyio.to_thread.run_sync(self._store.draft)
        try:
            fetched = await fetcher.download(
                url, file, credentials=credentials, limits=self._limits, if_none_match=etag if kept else ""
            )
            await anyio.to_thread.run_sync(file.close)
            if fetched.not_modified and kept is not None:
                return kept
            mime = await anyio.to_thread.run_sync(sniffed_type, draft)
            suffix = _SUFFIXES.get(mime) or PurePosixPath(reference.filename or fetched.name).suffix
            found = await anyio.to_thread.run_sync(
                partial(self._store.keep, draft, sha256=fetched.sha256, suffix=suffix)
            )
        finally:
            file.close()
            self._store.drop(draft)
        if fetched.etag:
            self._seen[name] = (fetched.etag, found.name)
            self._seen.move_to_end(name)
            while len(self._seen) > _REMEMBERED_URLS:
                self._seen.popitem(last=False)
        return found

    async def _s3_link(self, reference: FileReference, request: GenerateInput) -> str:
        """A signed link to `s3://bucket/key`.

        With the operator's keys only the operator's own bucket can be read; other buckets need the request's keys.
        """
        parts = urlsplit(reference.url)
        bucket, key = parts.netloc, parts.path.lstrip("/")
        if not bucket or not key:
            raise reference.refused("an s3 URL is s3://bucket/key")
        try:
            store = self._destinations.open_bucket(bucket, request.s3)
            return (await store.url(key, expires_in_s=_S3_LINK_S)).url
        except (StorageFailed, ValueError) as problem:
            raise reference.refused(str(problem)) from problem

    def _decode(self, reference: FileReference) -> InputFile:
        """Base64 to a file. Blocking."""
        suffix = PurePosixPath(reference.filename).suffix
        if reference.data:
            header = _DATA_URI.match(reference.data)
            if header is None:
                raise reference.refused("not a data URI")
            body = reference.data[header.end() :]
            plain = _unbase64(reference, body) if header.group(3) else unquote_to_bytes(body)
        else:
            plain = _unbase64(reference, reference.encoded)
        if not plain or len(plain) > self._limits.max_bytes:
            raise reference.refused("the file is empty" if not plain else "the file is over the size limit")
        file, draft = self._store.draft()
        try:
            with file:
                file.write(plain)
            suffix = _SUFFIXES.get(sniffed_type(draft)) or suffix
            return self._store.keep(draft, sha256=hashlib.sha256(plain).hexdigest(), suffix=suffix)
        finally:
            self._store.drop(draft)


def _may_recover(problem: InputUnavailable) -> bool:
    status = problem.details.get("status")
    return problem.details.get("reason") == "connection" or (status is not None and (status >= 500 or status == 429))


def credentials_seen(credentials: list[Credential]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a cache key must tell apart."""
    return [(one.url_prefix, sorted(one.headers.items())) for one in credentials]


def _unbase64(reference: FileReference, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise reference.refused("not base64") from problem


def _check_kind(file: InputFile, reference: FileReference) -> None:
    """Refuse a file of another family than its input's name promises, and pictures that unpack to gigabytes."""
    family = _FAMILIES.get(reference.input)
    mime = sniffed_type(file.path)
    if family is not None and mime.partition("/")[0] not in _FITS[family]:
        raise reference.refused(f"the file is {mime}, not {family}", reason="type")
    if mime.startswith("image/"):
        try:
            with Image.open(file.path) as image:
                pixels = image.width * image.height
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
            raise reference.refused("the picture cannot be read", reason="type") from problem
        if pixels > MAX_PIXELS:
            raise reference.refused(f"the picture has {pixels} pixels, the limit is {MAX_PIXELS}", reason="size")


def _placed(error: FleetError, reference: FileReference) -> FleetError:
    """The error with the place it belongs to."""
    if "node_id" not in error.details:
        error.message = f"node {reference.node_id} ({reference.class_type}), input {reference.input}: {error.message}"
        error.details |= {
            "node_id": reference.node_id,
            "class_type": reference.class_type,
            "input": reference.input,
        }
    return error

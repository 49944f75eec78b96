"""The five calls of an S3 multipart upload, by upload id: begin, list, send, finish, abort.

obstore uploads in parts too, but tells nobody the upload's id, so what a killed process began is lost to it. The
requests are signed by `aiohttp_s3_client`, which is loaded with the first long upload. A call that meets a broken
connection or a busy server is made again on its own, by `retry.TRANSFER`: all five may be repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

import aiohttp

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.retry import TRANSFER
from comfyfleet.settings.storage import S3Settings
from comfyfleet.storage.base import StorageFailed, checked_key
from comfyfleet.storage.s3_reasons import reason_of_answer

Buffer = bytes | memoryview
_PART_S = 120.0  # one part, not one file: 5 MiB in two minutes is 50 kB/s
_PIECE = 256 * 1024
_ANSWER_BYTES = 4 * 1024 * 1024  # of a list's page: a thousand parts are 300 kB
_NOTHING = hashlib.sha256(b"").hexdigest()
# Busy, not refused. AWS tells some of these with 200 or 400, in the answer's XML.
_BUSY = frozenset({408, 409, 429, 500, 502, 503, 504})
_BUSY_CODES = ("<Code>InternalError<", "<Code>SlowDown<", "<Code>RequestTimeout<", "<Code>ServiceUnavailable<")


class UploadGone(StorageFailed):
    """The server knows this upload no more: finished, aborted, or forgotten."""


@dataclass(frozen=True, kw_only=True)
class SentPart:
    """A part that the server has. etag: the MD5 of its bytes in hex, unless the bucket encrypts by KMS."""

    size: int
    etag: str


class S3Parts:
    """Multipart uploads to one bucket. The session is the caller's; `proxy_url` as in `s3.S3Storage`."""

    def __init__(
        self, settings: S3Settings, session: aiohttp.ClientSession, clock: Clock, ids: Ids, *, proxy_url: str = ""
    ) -> None:
        from aiohttp_s3_client import S3Client
        from aiohttp_s3_client.credentials import StaticCredentials

        region = settings.region or "us-east-1"
        endpoint = (settings.endpoint_url or f"https://s3.{region}.amazonaws.com").rstrip("/")
        keys = StaticCredentials(
            access_key_id=settings.access_key_id, secret_access_key=settings.secret_access_key, region=region
        )
        self._client = S3Client(session, f"{endpoint}/{settings.bucket}", credentials=keys)
        self._clock = clock
        self._ids = ids
        self._proxy_url = proxy_url or None
        self._timeout = aiohttp.ClientTimeout(total=_PART_S, sock_connect=max(1.0, settings.connect_timeout_s))

    async def begin(self, key: str, *, headers: Mapping[str, str]) -> str:
        """A new upload's id. headers: the finished object's type and metadata. Raises StorageFailed."""
        text, _ = await self._call("POST", key, {"uploads": ""}, headers=headers)
        found = _find(text, "UploadId")
        if not found:
            raise StorageFailed("the endpoint began no upload")
        return found

    async def sent(self, key: str, upload_id: str) -> dict[int, SentPart]:
        """The parts that arrived, by number. Raises UploadGone, StorageFailed."""
        found: dict[int, SentPart] = {}
        marker = "0"
        while True:
            text, _ = await self._call("GET", key, {"uploadId": upload_id, "part-number-marker": marker})
            try:
                page = ElementTree.fromstring(text)  # noqa: S314 - bounded, and expat bounds what entities make of it
                for part in page.iterfind("{*}Part"):
                    size, etag = int(part.findtext("{*}Size") or ""), (part.findtext("{*}ETag") or "").strip('"')
                    found[int(part.findtext("{*}PartNumber") or "")] = SentPart(size=size, etag=etag)
                following = page.findtext("{*}NextPartNumberMarker") or ""
                if page.findtext("{*}IsTruncated") != "true" or int(following) <= int(marker):
                    return found
            except (ElementTree.ParseError, ValueError) as problem:
                raise StorageFailed("the endpoint's list of parts makes no sense") from problem
            marker = following

    async def send(self, key: str, upload_id: str, number: int, data: Buffer, sha256: str) -> str:
        """Store one part, in place of an earlier one of its number; its ETag. Raises UploadGone, StorageFailed."""
        query = {"partNumber": str(number), "uploadId": upload_id}
        _, headers = await self._call("PUT", key, query, data=data, sha256=sha256)
        etag = headers.get("ETag", "").strip('"')
        if not etag:
            raise StorageFailed("the endpoint gave a part no ETag")
        return etag

    async def finish(self, key: str, upload_id: str, etags: Iterable[tuple[int, str]]) -> None:
        """Make the object of its parts, given by rising number. Raises UploadGone, StorageFailed."""
        root = ElementTree.Element("CompleteMultipartUpload", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
        for number, etag in etags:
            part = ElementTree.SubElement(root, "Part")
            ElementTree.SubElement(part, "PartNumber").text = str(number)
            ElementTree.SubElement(part, "ETag").text = f'"{etag}"'
        data = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
        sha256 = hashlib.sha256(data).hexdigest()
        text, _ = await self._call(
            "POST", key, {"uploadId": upload_id}, data=data, sha256=sha256, headers={"Content-Type": "application/xml"}
        )
        if "<Error>" in text:  # AWS answers 200 before it knows
            raise StorageFailed("upload to S3 failed: " + reason_of_answer(200, text))

    async def abort(self, key: str, upload_id: str) -> None:
        """Let the server drop the parts. Raises UploadGone, StorageFailed."""
        await self._call("DELETE", key, {"uploadId": upload_id})

    async def _call(
        self,
        method: str,
        key: str,
        query: dict[str, str],
        *,
        data: Buffer = b"",
        sha256: str = _NOTHING,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[str, Mapping[str, str]]:
        """The answer's text and headers, at the first attempt that finds the server at work."""
        reason = ""
        for wait_s in (*TRANSFER.delays(self._ids), None):
            try:
                async with self._client.request(
                    method,
                    checked_key(key),
                    params=query,
                    headers=dict(headers or {}),
                    data=_pieces(data) if data else None,
                    data_length=len(data) if method != "GET" else None,
                    content_sha256=sha256,
                    proxy=self._proxy_url,
                    timeout=self._timeout,
                    allow_redirects=False,
                ) as answer:
                    body = b""
                    while len(body) < _ANSWER_BYTES and not answer.content.at_eof():
                        body += await answer.content.read(_ANSWER_BYTES - len(body))
                    text = body.decode(errors="replace")
                    if "<Code>NoSuchUpload<" in text:
                        raise UploadGone("the server has forgotten the upload")
                    is_busy = answer.status in _BUSY or any(code in text for code in _BUSY_CODES)
                    if not is_busy and answer.status < 300:
                        return text, answer.headers
                    reason = reason_of_answer(answer.status, text)
                    if not is_busy:
                        break
            except aiohttp.ClientConnectorError:
                reason = "the endpoint cannot be reached"
            except TimeoutError:
                reason = "it took too long"
            except (aiohttp.ClientError, OSError):
                reason = "the connection broke off"
            if wait_s is not None:
                await self._clock.sleep(wait_s)
        raise StorageFailed("upload to S3 failed: " + reason)


async def _pieces(data: Buffer) -> AsyncIterator[bytes]:
    """A body in pieces of its own memory: a connection that is given up may still hold the last one."""
    for start in range(0, len(data), _PIECE):
        yield bytes(data[start : start + _PIECE])


def _find(text: str, name: str) -> str:
    """The text of the first such element of an answer, whatever its namespace; "" when there is none."""
    try:
        return ElementTree.fromstring(text).findtext(f"{{*}}{name}") or ""  # noqa: S314 - as above
    except ElementTree.ParseError:
        return ""

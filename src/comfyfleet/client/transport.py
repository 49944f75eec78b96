"""HTTP towards the control plane and workers: sessions, error bodies back into words, event streams into values.

The API key goes to the control plane alone, in a header. A worker gets the ticket and nothing else: it may be a
machine of somebody else's.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import aiohttp
import msgspec

from comfyfleet.client.stream import EventStream, TransportFailure
from comfyfleet.version import __version__
from comfyfleet.wire.errors import FleetError, all_errors

USER_AGENT = f"comfyfleet/{__version__}"
_ERRORS_BY_CODE = {kind.code: kind for kind in all_errors()}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer. body: parsed JSON where the media type or the text says so, else text or bytes."""

    status: int
    body: Any
    text: str
    content_type: str | None
    retry_after_s: float | None


def parse_body(raw: bytes, content_type: str) -> tuple[Any, str]:
    """(body, text): JSON whenever it is JSON, str for text media, bytes for anything else."""
    media = content_type.partition(";")[0].strip().lower()
    looks_json = raw[:1] in (b"{", b"[") or media.endswith("json")
    if looks_json:
        try:
            return msgspec.json.decode(raw), raw.decode("utf-8", "replace")
        except msgspec.DecodeError:
            pass
    if media.startswith("text/") or looks_json:
        text = raw.decode("utf-8", "replace")
        return text, text
    return (raw, "") if raw else ("", "")


def control_plane_error(answer: Answer) -> FleetError:
    """The control plane's error body as the class it was raised from, as far as the code is known."""
    body = answer.body if isinstance(answer.body, dict) else {}
    code, message = str(body.get("error", "")), str(body.get("msg", "") or answer.text[:300])
    kind = _ERRORS_BY_CODE.get(code)
    details = body.get("details")
    if kind is None:
        kind = type(error_of_status(answer.status, message))
    return kind(f"HTTP {answer.status}: {message}", **(details if isinstance(details, dict) else {}))


def error_of_status(status: int, message: str) -> FleetError:
    """The plainest error of ours with this HTTP status."""
    kind = next((k for k in all_errors() if k.status == status and k is not FleetError), FleetError)
    return kind(f"HTTP {status}: {message}")


@lru_cache(maxsize=64)
def _within(timeout_s: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=timeout_s, sock_connect=10.0)


def _retry_after(headers: Any) -> float | None:
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return None


class Transport:
    """One connection pool. Use as an async context manager."""

    def __init__(self, *, connection_limit: int, ca_url: str) -> None:
        self._connection_limit = connection_limit
        self._ca_url = ca_url
        self._tls: ssl.SSLContext | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def is_open(self) -> bool:
        return self._session is not None and not self._session.closed

    async def open(self) -> None:
        if not self.is_open:
            connector = aiohttp.TCPConnector(limit=self._connection_limit)
            self._session = aiohttp.ClientSession(
                connector=connector, headers={"User-Agent": USER_AGENT}, cookie_jar=aiohttp.DummyCookieJar()
            )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self, method: str, url: str, *, json: Any = None, key: str = "", timeout_s: float | None = 30.0
    ) -> Answer:
        """One request, one attempt. Raises TransportFailure when no whole answer came."""
        try:
            async with self._opened.request(
                method,
                url,
                data=msgspec.json.encode(json) if json is not None else None,
                headers=self._headers(key, has_body=json is not None),
                timeout=_within(timeout_s),
                ssl=await self._tls_for(url),
                allow_redirects=False,
            ) as response:
                raw = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise TransportFailure(str(error) or type(error).__name__) from error
        content_type = response.headers.get("Content-Type", "")
        body, text = parse_body(raw, content_type)
        return Answer(
            status=response.status,
            body=body,
            text=text,
            content_type=content_type or None,
            retry_after_s=_retry_after(response.headers),
        )

    async def stream(self, url: str, *, json: Any) -> tuple[Answer | None, EventStream | None]:
        """Post and follow: (None, values) on 2xx, else (the error answer, None)."""
        try:
            response = await self._opened.post(
                url,
                data=msgspec.json.encode(json),
                headers=self._headers("", has_body=True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
                ssl=await self._tls_for(url),
                allow_redirects=False,
            )
            if response.status // 100 == 2:
                return None, EventStream(response)
            async with response:
                raw = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise TransportFailure(str(error) or type(error).__name__) from error
        body, text = parse_body(raw, response.headers.get("Content-Type", ""))
        answer = Answer(
            status=response.status,
            body=body,
            text=text,
            content_type=response.headers.get("Content-Type"),
            retry_after_s=_retry_after(response.headers),
        )
        return answer, None

    @property
    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is not open: use `async with Serverless() as client`")
        return self._session

    @staticmethod
    def _headers(key: str, *, has_body: bool) -> dict[str, str]:
        headers = {"Content-Type": "application/json"} if has_body else {}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return headers

    async def _tls_for(self, url: str) -> ssl.SSLContext | bool:
        """System authorities and the control plane's own CA; fetched once, and only when https is spoken at all."""
        if not url.startswith("https://"):
            return True
        if self._tls is None:
            context = ssl.create_default_context()
            if not self._ca_url.startswith("https://"):
                async with self._opened.get(self._ca_url, timeout=aiohttp.ClientTimeout(total=10)) as response:
                    if response.status == 200:
                        context.load_verify_locations(cadata=await response.text())
            self._tls = context
        return self._tls

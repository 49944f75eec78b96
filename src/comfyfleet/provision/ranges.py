"""Ask a server for a range of a file: redirects by hand, tokens per hop, every answer read as a fact or an error.

`Remote` remembers where the redirects led, so that a thousand chunks do not walk the same way again, and forgets it
when that place refuses. A host that says 429 or 503 with `Retry-After` is left alone that long by all connections.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import yarl

from comfyfleet.clock import Clock
from comfyfleet.provision.chunks import Identity
from comfyfleet.provision.sources import authorization, token_hint
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.wire.errors import ProvisionFailed

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 8
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST_PAUSE_S = 300.0


class Transient(Exception):
    """Worth another try: a cut, a time-out, a server's bad moment. retry_after_s: what the server asked for."""

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class SourceChanged(Exception):
    """The server has another file at this address than when the download began."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An open body. is_partial False: the server knows no ranges, and the body is the whole file."""

    identity: Identity
    is_partial: bool
    blocks: AsyncIterator[bytes]


@dataclass(kw_only=True)
class Pauses:
    """Until when (monotonic s) each host asked to be left alone. Shared by all downloads of a process."""

    until: dict[str, float] = field(default_factory=dict)

    def remaining_s(self, host: str, now: float) -> float:
        return max(0.0, self.until.get(host, 0.0) - now)

    def ask(self, host: str, seconds: float, now: float) -> None:
        self.until[host] = max(self.until.get(host, 0.0), now + min(seconds, LONGEST_PAUSE_S))


class Remote:
    """One file's address. `open` asks for a range of it."""

    def __init__(
        self,
        url: str,
        *,
        settings: SourceSettings,
        session: aiohttp.ClientSession,
        clock: Clock,
        pauses: Pauses,
        idle_s: float,
    ) -> None:
        try:
            self.url = yarl.URL(url, encoded="%" in url)
        except ValueError as problem:
            raise ProvisionFailed("a source's address is no URL", reason="url") from problem
        self._settings = settings
        self._session = session
        self._clock = clock
        self._pauses = pauses
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=idle_s)
        self._place: yarl.URL | None = None
        self._linked: tuple[int, str] = (0, "")

    @asynccontextmanager
    async def open(self, start: int, end: int | None, *, known: Identity | None = None) -> AsyncIterator[Answer]:
        """Bytes from start to end (exclusive; None: to the last). Raises Transient, SourceChanged, ProvisionFailed."""
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        if known is not None and known.etag:
            headers["If-Range"] = known.etag
        try:
            async with self._ask("GET", headers) as answer:
                yield self._read(answer, start, known)
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:
            raise Transient(_named(problem)) from problem

    async def size(self) -> int | None:
        """The file's size by a HEAD request; None where the server will not say."""
        try:
            async with self._ask("HEAD", {}) as answer:
                size_bytes = self._linked[0] or answer.content_length or 0
                return size_bytes or None
        except (aiohttp.ClientError, OSError, TimeoutError, Transient, SourceChanged, ProvisionFailed):
            return None  # the download itself will tell why

    @asynccontextmanager
    async def _ask(self, method: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        current = self._place or self.url
        for _ in range(_MAX_REDIRECTS + 1):
            await self._clock.sleep(self._pauses.remaining_s(current.authority, self._clock.monotonic()))
            async with self._session.request(
                method,
                current,
                headers={**headers, **authorization(current, self._settings)},
                allow_redirects=False,
                timeout=self._timeout,
                proxy=self._settings.proxy_for(current.scheme, current.host or ""),
            ) as answer:
                if answer.status in _REDIRECTS:
                    current = self._next_hop(current, answer)
                    continue
                self._refuse(current, answer)
                self._place = current
                yield answer
                return
        raise ProvisionFailed(f"{self._shown}: more than {_MAX_REDIRECTS} redirects", reason="redirect")

    def _next_hop(self, current: yarl.URL, answer: aiohttp.ClientResponse) -> yarl.URL:
        # The hub says size and SHA-256 of a large file on the answer that leads to the storage behind it.
        if answer.headers.get("X-Linked-Size", "").isdigit():
            linked = answer.headers.get("X-Linked-ETag", "").strip('"')
            self._linked = int(answer.headers["X-Linked-Size"]), linked if _SHA256.fullmatch(linked) else ""
        try:
            following = current.join(yarl.URL(answer.headers["Location"], encoded=True))
        except (KeyError, ValueError) as problem:
            raise ProvisionFailed(f"{self._shown}: a redirect led to no URL", reason="redirect") from problem
        is_downgrade = current.scheme == "https" and following.scheme != "https"
        if following.scheme not in ("http", "https") or is_downgrade:
            raise ProvisionFailed(f"{self._shown}: a redirect led away from https", reason="redirect")
        return following.with_user(None)

    def _refuse(self, current: yarl.URL, answer: aiohttp.ClientResponse) -> None:
        """Raise what a status other than success means."""
        status = answer.status
        if status in (200, 206):
            return
        if self._place is not None and status in (400, 401, 403, 404, 410):
            self._place = None  # a signed address ran out: walk the redirects again
            raise Transient(f"HTTP {status} from the address that a redirect led to")
        if status in (408, 425, 429) or status >= 500:
            wait_s = retry_after_s(answer.headers.get("Retry-After", ""), self._clock.now)
            if wait_s is not None:
                self._pauses.ask(current.authority, wait_s, self._clock.monotonic())
            raise Transient(f"HTTP {status}", wait_s)
        if status == 416:
            if answer.headers.get("Content-Range") == "bytes */0":
                raise ProvisionFailed(f"{self._shown} has an empty file", reason="size")
            raise SourceChanged
        hint = f": {token_hint(current, self._settings)}" if status in (401, 403) else ""
        raise ProvisionFailed(f"{self._shown} answered {status}{hint}", reason="status", status=status)

    def _read(self, answer: aiohttp.ClientResponse, start: int, known: Identity | None) -> Answer:
        etag = answer.headers.get("ETag", "")
        strong = etag if etag.startswith('"') else ""
        linked_bytes, sha256 = self._linked
        if answer.status == 206:
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != start:
                raise Transient("the server answered another range than was asked for")
            total = int(found[3])
        else:
            if known is not None:
                raise SourceChanged
            total = answer.content_length or linked_bytes
        identity = Identity(size_bytes=total, etag=strong, sha256=sha256)
        if known is not None and (
            identity.size_bytes != known.size_bytes or (known.etag and strong and strong != known.etag)
        ):
            raise SourceChanged
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            # Bytes of a compressed form have other offsets and another digest: nothing here would fit together.
            raise ProvisionFailed(f"{self._shown} answered compressed, though asked not to", reason="encoding")
        is_page = answer.content_type == "text/html"
        if is_page:
            raise ProvisionFailed(f"{self._shown} answered with a web page, not a file", reason="page")
        return Answer(identity=identity, is_partial=answer.status == 206, blocks=answer.content.iter_any())

    @property
    def _shown(self) -> str:
        """The address as it may be shown: queries can hold keys."""
        return str(self.url.with_query(None).with_fragment(None).with_user(None))


def retry_after_s(header: str, now: Callable[[], float]) -> float | None:
    """`Retry-After` in seconds, from either of its forms; None when there is none that can be read."""
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now())
    except ValueError:
        return None


def _named(problem: Exception) -> str:
    """One line; a URL's query never gets in (aiohttp's own texts name hosts only)."""
    return f"{type(problem).__name__}: {problem}".partition("?")[0] if str(problem) else type(problem).__name__

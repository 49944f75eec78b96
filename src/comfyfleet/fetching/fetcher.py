"""Download a file, or post a body, at an address that a stranger named: bounded in where, how much and how long.

Redirects are followed by hand, so that every hop is checked as the first one was; credentials are chosen again for
each hop by its own URL, so they never travel to another host. Not a general HTTP client: no cookies, no proxy from
the environment, no keep-alive promises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Self

import aiohttp
import anyio
import anyio.to_thread
import yarl
from aiohttp.abc import AbstractResolver

from comfyfleet.clock import Clock
from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.body import Decoder
from comfyfleet.fetching.resolver import GuardedResolver, check_host
from comfyfleet.wire.errors import FleetError, InputRefused, InputUnavailable, room_on_disk

_USER_AGENT = "comfyfleet-fetcher"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_WRITE_BYTES = 1024 * 1024
_EXCERPT_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """How much and how long. `idle_s`: longest silence; `slow_bytes_per_s`: average asked for after `slow_grace_s`."""

    max_bytes: int = 4 * 1024**3
    total_s: float = 1800.0
    connect_s: float = 10.0
    idle_s: float = 30.0
    slow_bytes_per_s: float = 2048.0
    slow_grace_s: float = 15.0
    max_redirects: int = 5


@dataclass(frozen=True, kw_only=True)
class Credential:
    """Headers for URLs of one origin whose path begins with a prefix. Never logged, never sent anywhere else."""

    url_prefix: str
    headers: Mapping[str, str] = field(repr=False)

    def fits(self, url: yarl.URL) -> bool:
        """Same scheme, host and port, and the path at or below the prefix's."""
        prefix = yarl.URL(self.url_prefix)
        folder = prefix.path if prefix.path.endswith("/") else prefix.path + "/"
        return prefix.origin() == url.origin() and (url.path == prefix.path or url.path.startswith(folder))


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A download that ended well. `name` is the last part of the final URL's path: a hint, not a safe file name."""

    size_bytes: int
    sha256: str
    media_type: str
    name: str
    etag: str = ""
    not_modified: bool = False


@dataclass(frozen=True, kw_only=True)
class Posted:
    """What a receiver said: its status and the first KiB of its body."""

    status: int
    retry_after_s: float | None
    excerpt: str


class GuardedFetcher:
    """One session for all that a request may name. Use as an async context manager."""

    def __init__(
        self,
        rules: AddressRules,
        clock: Clock,
        *,
        limits: FetchLimits | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.rules = rules
        self._clock = clock
        self._limits = limits or FetchLimits()
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            resolver=GuardedResolver(self.rules, self._resolver),
            # A cached answer would outlive its check; every new connection resolves and checks.
            use_dns_cache=False,
            limit=64,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def check_url(self, url: str, *, field: str | None = None) -> yarl.URL:
        """Parse a URL that we may go to; `field` is where the caller gave it.

        Raises InputRefused for another scheme, no host or a refused address.
        """
        try:
            parsed = yarl.URL(url)
            port = parsed.port
        except ValueError as problem:
            raise InputRefused("not a URL", reason="url", field=field) from problem
        if parsed.scheme not in ("http", "https") or not parsed.host or port is None:
            raise InputRefused("only http and https URLs with a host are fetched", reason="url", field=field)
        try:
            check_host(self.rules, parsed.host)
        except InputRefused as refused:
            raise InputRefused(refused.message, **refused.details, field=field) from None
        return parsed

    async def download(
        self,
        url: str,
        into: BinaryIO,
        *,
        credentials: Sequence[Credential] = (),
        limits: FetchLimits | None = None,
        if_none_match: str = "",
    ) -> Fetched:
        """Stream the body into an open file; after InputRefused or InputUnavailable the caller drops the file."""
        within = limits or self._limits
        try:
            with anyio.fail_after(within.total_s):
                return await self._follow(url, into, credentials, within, if_none_match)
        except TimeoutError as problem:
            raise InputUnavailable(
                "the file did not arrive in time", reason="timeout", limit_s=within.total_s
            ) from problem
        except (aiohttp.ClientError, OSError) as problem:
            raise InputUnavailable("the file's host cannot be reached or broke off", reason="connection") from problem

    async def _follow(
        self, url: str, into: BinaryIO, credentials: Sequence[Credential], within: FetchLimits, if_none_match: str
    ) -> Fetched:
        current = self.check_url(url)
        for _ in range(within.max_redirects + 1):
            headers = {"If-None-Match": if_none_match} if if_none_match else {}
            for credential in credentials:
                if credential.fits(current):
                    headers.update(credential.headers)
            async with self._open.get(
                current, headers=headers, allow_redirects=False, timeout=_timeout(within)
            ) as answer:
                if answer.status in _REDIRECTS:
                    following = self._next_hop(current, answer.headers.get("Location", ""))
                    current = following
                    continue
                if answer.status == 304 and if_none_match:
                    return Fetched(
                        size_bytes=0, sha256="", media_type="", name=current.name, etag=if_none_match, not_modified=True
                    )
                if answer.status != 200:
                    raise InputUnavailable(
                        f"the file's host answered {answer.status}", reason="status", status=answer.status
                    )
                return await self._save(answer, current, into, within)
        raise InputRefused(f"more than {within.max_redirects} redirects", reason="redirect")

    def _next_hop(self, current: yarl.URL, location: str) -> yarl.URL:
        """Where a redirect leads: it may not bring a password of its own, nor lead from TLS to the open."""
        try:
            target = current.join(yarl.URL(location))
        except ValueError as problem:
            raise InputRefused("a redirect led to no URL", reason="redirect") from problem
        following = self.check_url(str(target)).with_user(None)
        if current.scheme == "https" and following.scheme == "http":
            raise InputRefused("a redirect led from https to http", reason="redirect")
        return following

    async def _save(
        self, answer: aiohttp.ClientResponse, url: yarl.URL, into: BinaryIO, within: FetchLimits
    ) -> Fetched:
        if (answer.content_length or 0) > within.max_bytes:
            raise _too_large(within)
        decoder = Decoder(answer.headers.get("Content-Encoding", ""))
        digest = hashlib.sha256()
        size = received = 0
        pending = bytearray()
        began = self._clock.monotonic()
        async for raw in answer.content.iter_any():
            received += len(raw)
            took_s = self._clock.monotonic() - began
            if took_s > within.slow_grace_s and received < within.slow_bytes_per_s * took_s:
                raise InputUnavailable("the file came too slowly", reason="slow")
            for piece in decoder.feed(raw):
                size += len(piece)
                if size > within.max_bytes:
                    raise _too_large(within)
                digest.update(piece)
                pending += piece
                if len(pending) >= _WRITE_BYTES:
                    await _write(into, bytes(pending))
                    pending.clear()
        decoder.finish()
        if pending:
            await _write(into, bytes(pending))
        return Fetched(
            size_bytes=size,
            sha256=digest.hexdigest(),
            media_type=answer.content_type or "",
            name=url.name,
            etag=answer.headers.get("ETag", ""),
        )

    async def post(self, url: str, body: bytes, *, headers: Mapping[str, str], timeout_s: float) -> Posted:
        """Post once; a redirect is an answer, not followed. Raises InputRefused, or InputUnavailable for no answer."""
        target = self.check_url(url)
        try:
            with anyio.fail_after(timeout_s):
                async with self._open.post(
                    target,
                    data=body,
                    headers=dict(headers),
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(timeout_s, self._limits.connect_s)),
                ) as answer:
                    excerpt = await _excerpt(answer)
                    return Posted(
                        status=answer.status,
                        retry_after_s=_seconds(answer.headers.get("Retry-After", "")),
                        excerpt=excerpt,
                    )
        except TimeoutError as problem:
            raise InputUnavailable(f"no answer within {timeout_s:g} s", reason="timeout") from problem
        except (aiohttp.ClientError, OSError) as problem:
            raise InputUnavailable("no connection, or it broke off", reason="connection") from problem

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise FleetError("the fetcher is closed")
        return self._session


async def _write(into: BinaryIO, data: bytes) -> None:
    with room_on_disk():
        await anyio.to_thread.run_sync(into.write, data)


def _timeout(within: FetchLimits) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=within.connect_s, sock_read=within.idle_s)


def _too_large(within: FetchLimits) -> InputRefused:
    return InputRefused(f"the file is over {within.max_bytes} bytes", reason="size", max_bytes=within.max_bytes)


def _seconds(header: str) -> float | None:
    """`Retry-After` in seconds; its date form is not read."""
    return float(header) if header.isascii() and header.isdigit() and len(header) < 8 else None


async def _excerpt(answer: aiohttp.ClientResponse) -> str:
    """The first KiB of the answer; reading stops there."""
    found = bytearray()
    async for piece in answer.content.iter_any():
        found += piece
        if len(found) >= _EXCERPT_BYTES:
            break
    return bytes(found[:_EXCERPT_BYTES]).decode("utf-8", "replace")

"""S3 and what speaks like it: path style, links signed without asking anybody.

One obstore client per set of credentials, kept while it is in use. A file of more than one part goes by
`long_uploads`. Links are cut to the seven days that Signature V4 allows, and the answer says so.
"""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from comfyfleet.clock import Clock
from comfyfleet.retry import TRANSFER
from comfyfleet.settings.storage import WEEK_S, S3Settings
from comfyfleet.storage.base import SignedUrl, StorageFailed, checked_key
from comfyfleet.storage.long_uploads import PART_BYTES, LongUploads
from comfyfleet.storage.s3_reasons import reason_of

_KEPT_STORES = 64
_DIGEST = "sha256"


class S3Storage:
    """One bucket. `proxy_url` sends every connection through a guard (see `fetching.tunnel`)."""

    def __init__(self, settings: S3Settings, clock: Clock, long: LongUploads, *, proxy_url: str = "") -> None:
        self._clock = clock
        self._settings = settings
        self._long = long
        self._guarded = bool(proxy_url)
        client: dict[str, Any] = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=max(1.0, settings.connect_timeout_s)),
            "timeout": timedelta(seconds=120),
        }
        if proxy_url:
            client["proxy_url"] = proxy_url
        config: dict[str, Any] = {"endpoint": _checked_endpoint(settings.endpoint_url)} if settings.endpoint_url else {}
        config |= {
            "access_key_id": settings.access_key_id,
            "secret_access_key": settings.secret_access_key,
            "region": settings.region or "us-east-1",
            "virtual_hosted_style_request": False,
            "client_options": client,
        }
        try:
            self._store = S3Store(settings.bucket, retry_config=_retries(settings.attempts - 1), **config)
        except (BaseError, ValueError) as problem:
            raise StorageFailed("the S3 settings make no sense: " + reason_of(problem)) from problem

    async def put(self, path: Path, key: str, *, media_type: str, sha256: str = "") -> None:
        media_type = media_type or "application/octet-stream"
        try:
            size = (await anyio.Path(path).stat()).st_size
            if size <= PART_BYTES:
                attributes = {"Content-Type": media_type, **({_DIGEST: sha256} if sha256 else {})}
                await obstore.put_async(self._store, checked_key(key), path, attributes=attributes, use_multipart=False)
                return
            await self._long.put(
                path,
                checked_key(key),
                size=size,
                sha256=sha256,
                headers={"Content-Type": media_type, **({f"x-amz-meta-{_DIGEST}": sha256} if sha256 else {})},
                settings=self._settings,
                guarded=self._guarded,
                is_there=partial(self._is_there, key, size, sha256),
            )
        except (BaseError, OSError) as problem:
            raise StorageFailed("upload to S3 failed: " + reason_of(problem)) from problem

    async def _is_there(self, key: str, size: int, sha256: str) -> bool:
        """Whether this very file arrived before a restart. Asks impatiently, so it also finds a store that is away."""
        try:
            found = await obstore.get_async(self._store, checked_key(key), options={"head": True})
        except (NotFoundError, FileNotFoundError):
            return False
        return bool(sha256) and found.meta["size"] == size and found.attributes.get(_DIGEST) == sha256

    async def url(self, key: str, *, expires_in_s: float) -> SignedUrl:
        expires_in_s = float(int(min(max(1.0, expires_in_s), WEEK_S)))
        now = self._clock.now()
        try:
            url = await obstore.sign_async(self._store, "GET", checked_key(key), timedelta(seconds=expires_in_s))
        except BaseError as problem:
            raise StorageFailed("signing failed: " + reason_of(problem)) from problem
        return SignedUrl(url=url, expires_at=float(int(now + expires_in_s)))

    async def delete(self, key: str) -> None:
        try:
            await obstore.delete_async(self._store, checked_key(key))
        except (NotFoundError, FileNotFoundError):
            return
        except BaseError as problem:
            raise StorageFailed("deleting from S3 failed: " + reason_of(problem)) from problem


def _retries(retries: int) -> dict[str, Any]:
    """obstore's backoff by our named policy; `retries` after the first attempt, of each request on its own."""
    return {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=170),
        "backoff": {
            "init_backoff": timedelta(seconds=TRANSFER.first_s),
            "max_backoff": timedelta(seconds=TRANSFER.cap_s),
            "base": TRANSFER.factor,
        },
    }


class S3Storages:
    """The clients in use, by their settings; the least recently used one is dropped."""

    def __init__(self, clock: Clock, long: LongUploads) -> None:
        self._storage = lru_cache(maxsize=_KEPT_STORES)(partial(S3Storage, clock=clock, long=long))

    def get(self, settings: S3Settings, *, proxy_url: str = "") -> S3Storage:
        """The client for these credentials. Raises StorageFailed when they cannot be right."""
        return self._storage(settings, proxy_url=proxy_url)


def _checked_endpoint(url: str) -> str:
    """The endpoint, if it is an http or https URL with a host (obstore panics on others). Raises StorageFailed."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_good = False
    if not is_good or any(letter.isspace() or letter in "\\{}<>|^`" for letter in url):
        raise StorageFailed("the S3 endpoint is no http or https URL")
    return url

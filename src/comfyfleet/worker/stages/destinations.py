"""Which store takes a job's outputs: the request's S3 over the environment's, field by field; else none but the disk.

An endpoint that a request names is reached only through the guarded tunnel, under the same address rules as any other
URL.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.settings.storage import S3Settings
from comfyfleet.storage.base import Storage, StorageFailed
from comfyfleet.storage.s3 import S3Storages
from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.generation import S3Target
from comfyfleet.wire.requests import check_s3

_MAX_TIMEOUT_S = 300.0
_MAX_ATTEMPTS = 10


def effective_s3(operator: S3Settings | None, request: S3Target) -> S3Settings | None:
    """The bucket and keys to use, or None for local files only. Raises Unprocessable naming the field."""
    operator = operator or S3Settings()
    check_s3(request, has_keys=operator.has_keys, has_bucket=bool(operator.bucket))
    own_keys = bool(request.access_key_id)
    bucket = request.bucket_name or operator.bucket
    if not bucket or not (own_keys or operator.has_keys):
        return None
    chosen = replace(
        operator,
        bucket=bucket,
        endpoint_url=request.endpoint_url or operator.endpoint_url,
        region=request.region or operator.region,
        connect_timeout_s=min(request.connect_timeout, _MAX_TIMEOUT_S)
        if request.connect_timeout > 0
        else operator.connect_timeout_s,
        attempts=min(request.connect_attempts, _MAX_ATTEMPTS) if request.connect_attempts > 0 else operator.attempts,
    )
    if own_keys:
        chosen = replace(chosen, access_key_id=request.access_key_id, secret_access_key=request.secret_access_key)
    return chosen


class Destinations:
    """Opens the store of a request."""

    def __init__(
        self, operator: S3Settings | None, storages: S3Storages, fetcher: GuardedFetcher, *, tunnel_url: str
    ) -> None:
        self._operator = operator
        self._storages = storages
        self._fetcher = fetcher
        self._tunnel_url = tunnel_url

    def check(self, request: S3Target) -> None:
        """Refuse settings that can never work, before the job is accepted. Raises Unprocessable or InputRefused."""
        chosen = effective_s3(self._operator, request)
        if chosen is not None and request.endpoint_url:
            self._fetcher.check_url(chosen.endpoint_url, field="input.s3.endpoint_url")

    def open(self, request: S3Target) -> Storage | None:
        """The S3 store, or None when there is none. Raises StorageFailed."""
        try:
            chosen = effective_s3(self._operator, request)
            if chosen is None:
                return None
        except FleetError as problem:
            raise StorageFailed(problem.message) from problem
        return self._storages.get(chosen, proxy_url=self._tunnel_url if request.endpoint_url else "")

    def open_bucket(self, bucket: str, request: S3Target) -> Storage:
        """A store for reading `s3://bucket/…`. Raises StorageFailed when these keys may not read there."""
        own_keys = bool(request.access_key_id and request.secret_access_key)
        if not own_keys and (self._operator is None or bucket != self._operator.bucket):
            raise StorageFailed("reading from this bucket needs s3.access_key_id and s3.secret_access_key")
        store = self.open(msgspec.structs.replace(request, bucket_name=bucket))
        if store is None:
            raise StorageFailed("no S3 keys are set")
        return store

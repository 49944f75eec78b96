"""A durable job's result may be read when its links are over: those to our own files are signed again then.

Only a link that we signed, to a file that is still there, for as long as the first one lived. A link into a store is
the worker's to sign: it alone has that store's keys, and a caller's own keys are forgotten with the job's end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from comfyfleet.clock import Clock
from comfyfleet.control.jobs import Job
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.base import checked_key
from comfyfleet.storage.local import URL_PREFIX

# A link that ends within this is as good as over, and no new one is shorter.
_SOON_S = 60.0


class _Link(msgspec.Struct):
    url_expires_at: float | None = None


class _Links(msgspec.Struct):
    output: list[_Link] = []


class FreshLinks:
    """root: the folder behind `/files/`."""

    def __init__(self, root: Path, signer: UrlSigner, clock: Clock) -> None:
        self._root = root
        self._signer = signer
        self._clock = clock

    def result(self, job: Job) -> msgspec.Raw | None:
        """The job's result, as it was stored unless a link in it is over."""
        if job.result is None:
            return None
        stored = job.result.encode()
        soon = self._clock.now() + _SOON_S
        try:
            links = msgspec.json.decode(stored, type=_Links).output
            if any(link.url_expires_at is not None and link.url_expires_at <= soon for link in links):
                return msgspec.Raw(self._renewed(msgspec.json.decode(stored), job.finished_at or 0.0))
        except msgspec.DecodeError:  # a foreign worker's result may be of any shape
            pass
        return msgspec.Raw(stored)

    def _renewed(self, result: Any, finished_at: float) -> bytes:
        now = self._clock.now()
        for output in result["output"]:
            expires_at = output.get("url_expires_at")
            if expires_at is None or expires_at > now + _SOON_S:
                continue
            for_s = max(expires_at - finished_at, _SOON_S)
            if fresh := self._fresh(output.get("url", ""), for_s):
                output["url"], output["url_expires_at"] = fresh, float(int(now + for_s))
                if output.get("poster_url"):
                    output["poster_url"] = self._fresh(output["poster_url"], for_s) or output["poster_url"]
        return msgspec.json.encode(result)

    def _fresh(self, url: str, for_s: float) -> str | None:
        """The same link with a new end; None for one that is not ours or leads nowhere."""
        parts = urlsplit(url)
        path, query = unquote(parts.path), parse_qs(parts.query)
        expires, signature = query.get("expires", [""])[0], query.get("signature", [""])[0]
        if not path.startswith(URL_PREFIX) or not self._signer.is_ours(path, expires, signature):
            return None
        if not (self._root / checked_key(path.removeprefix(URL_PREFIX))).is_file():
            return None
        return parts._replace(query=self._signer.query(path, for_s)).geturl()

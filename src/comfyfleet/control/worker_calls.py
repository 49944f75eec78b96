"""What the control plane says to a worker about one job: start it, follow it, cancel it. HTTP only, no decisions.

Our worker answers `/generate` at once and is followed at `/result/{id}` by server-sent events; a public PyWorker knows
neither (404) and gets `/generate/sync`, whose answer is the result and whose connection is the job: hanging up cancels
it. Every call shows a ticket in `auth_data`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from comfyfleet.web import NOT_JSON
from comfyfleet.wire.routing import RouteReady

# Our worker says every 15 s that it is alive; one that is silent for so long is asked again before it is lost.
_FOLLOW_IDLE_S = 40.0
_START = aiohttp.ClientTimeout(total=30.0)
_FOLLOW = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_FOLLOW_IDLE_S)
_SYNC = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
_encode = msgspec.json.encode


class Unreachable(Exception):
    """The worker did not answer, or stopped answering: nobody knows what became of the job."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The worker did not take the job, or has it no more. retry_after_s: None where a retry cannot help."""

    status: int
    code: str
    message: str
    details: dict[str, Any]
    retry_after_s: float | None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """It runs there; follow it."""


@dataclass(frozen=True, kw_only=True)
class OnlySynchronous:
    """A public PyWorker: it takes the job by `wait_for` and knows no way to ask for it later."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The worker's result: `body` is its JSON, `status` what HTTP said."""

    status: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class News:
    """Progress, as the worker tells it (JSON object)."""

    frame: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Alive:
    """The worker has the job, and nothing new to say of it."""


class WorkerCalls:
    """One HTTP session to all workers."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def start(self, ticket: RouteReady, payload: bytes) -> Taken | OnlySynchronous | Refused | Ended:
        """Hand the job over. payload: `{"input": …}` as JSON. Raises Unreachable: it may have arrived or not."""
        try:
            status, answer, headers = await self._post(ticket.url + "/generate", _call(ticket, payload), _START)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(str(error)) from error
        if status == 202:
            return Taken()
        if status == 404 and not _is_ours(answer):
            return OnlySynchronous()
        return _ended_or_refused(status, answer, headers)

    async def wait_for(self, ticket: RouteReady, payload: bytes) -> Refused | Ended:
        """Have the job done by a public PyWorker, however long it takes. Raises Unreachable."""
        try:
            status, answer, headers = await self._post(ticket.url + "/generate/sync", _call(ticket, payload), _SYNC)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(str(error)) from error
        return _foreign_end(status, answer, headers)

    async def follow(self, ticket: RouteReady, job_id: str) -> AsyncIterator[Alive | News | Ended | Refused]:
        """Progress, then the end. Raises Unreachable when the stream breaks off, or is silent for long, before it."""
        body = b'{"auth_data":' + _encode(ticket) + b"}"
        headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
        try:
            async with self._session.post(
                f"{ticket.url}/result/{job_id}", data=body, headers=headers, timeout=_FOLLOW
            ) as answer:
                if "text/event-stream" not in answer.headers.get("Content-Type", ""):
                    yield _ended_or_refused(answer.status, await answer.read(), dict(answer.headers))
                    return
                yield Alive()
                async for line in _lines(answer.content):
                    if line.startswith(b":"):
                        yield Alive()
                    if not line.startswith(b"data:"):
                        continue
                    line = line[5:].strip()
                    frame = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
                    if bytes(frame.get("status", msgspec.Raw(b'""'))) == b'"final_result"' and "result" in frame:
                        yield Ended(status=200, body=bytes(frame["result"]))
                        return
                    yield News(frame=msgspec.json.decode(line))
        except (aiohttp.ClientError, TimeoutError, OSError, *NOT_JSON) as error:
            raise Unreachable(str(error)) from error
        raise Unreachable("the stream ended without a result")

    async def cancel(self, ticket: RouteReady, job_id: str) -> bool:
        """True if the job is over there. A worker that does not know it may be about to get it: tell it again."""
        return await self._stop(ticket, job_id) == 200

    async def withdraw(self, ticket: RouteReady, job_id: str) -> bool:
        """True if a worker that is to get the job no more does not have it, or not any longer."""
        return await self._stop(ticket, job_id) in (200, 404)

    async def _stop(self, ticket: RouteReady, job_id: str) -> int:
        """What HTTP said; 0 for nothing."""
        try:
            body = b'{"auth_data":' + _encode(ticket) + b"}"
            status, _, _ = await self._post(f"{ticket.url}/cancel/{job_id}", body, _START)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0
        return status

    async def _post(self, url: str, body: bytes, within: aiohttp.ClientTimeout) -> tuple[int, bytes, dict[str, str]]:
        async with self._session.post(
            url, data=body, headers={"Content-Type": "application/json"}, timeout=within
        ) as answer:
            return answer.status, await answer.read(), dict(answer.headers)


def _call(ticket: RouteReady, payload: bytes) -> bytes:
    return b'{"auth_data":' + _encode(ticket) + b',"session_id":null,"payload":' + payload + b"}"


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines may be longer than the reader's own limit (a result has megabytes)."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def _is_ours(answer: bytes) -> bool:
    return b'"status"' in answer and b'"error"' in answer


class _Error(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""
    details: dict[str, Any] = {}


class _Result(msgspec.Struct, frozen=True):
    status: str = ""
    message: str = ""
    error: _Error = _Error()


def _foreign_end(status: int, answer: bytes, headers: dict[str, str]) -> Ended | Refused:
    """What a public PyWorker passes on is its model's answer, of any kind; the known wrapper fails jobs with a 5xx."""
    if not 200 <= status < 300:
        try:
            said = msgspec.json.decode(answer, type=_Result)
        except NOT_JSON:
            said = _Result()
        has_run = said.status in ("failed", "cancelled")
        return Ended(status=status, body=answer) if has_run else _ended_or_refused(status, answer, headers)
    try:
        found = msgspec.json.decode(answer)
    except NOT_JSON:
        found = _media(answer, headers.get("Content-Type", ""))
    if isinstance(found, dict) and "status" in found:
        return Ended(status=status, body=answer)
    whole = found if isinstance(found, dict) else {"response": found}
    return Ended(status=status, body=_encode({**whole, "status": "completed"}))


def _media(answer: bytes, kind: str) -> Any:
    """Text as it is; anything else, and what only says it is text, in base64."""
    if kind.startswith("text/"):
        with contextlib.suppress(UnicodeDecodeError):
            return answer.decode()
    return {"base64": answer, "mime": kind}


def _ended_or_refused(status: int, answer: bytes, headers: dict[str, str]) -> Ended | Refused:
    """A result says how the job ended; anything else is a refusal, which some waiting may mend."""
    try:
        result = msgspec.json.decode(answer, type=_Result)
    except NOT_JSON:
        result = _Result()
    code = result.error.code
    has_run = status == 200 or (status == 422 and code == "job_failed") or status == 499
    if has_run and result.status:
        return Ended(status=status, body=answer)
    retry_after_s: float | None = None
    if status in (408, 409, 425, 429) or status >= 500 or status == 401:
        text = headers.get("Retry-After", "")
        retry_after_s = float(text) if text.isdigit() else 1.0
    return Refused(
        status=status,
        code=code or f"worker_{status}",
        message=result.error.message or result.message or f"the worker answered {status}",
        details=result.error.details,
        retry_after_s=retry_after_s,
    )

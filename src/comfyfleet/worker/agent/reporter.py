"""Tell the control plane, again and again: who this worker is, how loaded, how fast, and what ended.

A report that is not taken is repeated with the next state; sums are kept until one arrives. The control plane may be
away for hours: this loop never gives up and never stops the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import anyio
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.wire.errors import Fenced
from comfyfleet.wire.workers import FinishedRequests, ReportTaken, WorkerStatusReport
from comfyfleet.worker.agent.lease import Lease
from comfyfleet.worker.agent.load_book import LoadBook, LoadSums

log = structlog.get_logger()

TICK_S = 1.0
QUIET_S = 10.0
# News that come thick go together: a busy worker reports ten times a second and not with each job's begin and end.
BREATH_S = 0.1
TIMEOUT = aiohttp.ClientTimeout(total=10.0)
# Where there are several addresses: one that holds its answer back is not waited for that long.
TIMEOUT_OF_SEVERAL = aiohttp.ClientTimeout(total=4.0)


def is_due(*, is_changed: bool, since_last_s: float, is_loaded: bool) -> bool:
    """Busy: each second. Idle or loading without news: each ten."""
    return is_changed or since_last_s >= QUIET_S or (not is_loaded and since_last_s >= QUIET_S)


@dataclass(frozen=True, kw_only=True)
class ReportTarget:
    """Where reports go and who sends them. mtoken is the worker's secret; it is in the body, as the protocol has it."""

    report_urls: tuple[str, ...]
    worker_id: int
    mtoken: str
    incarnation: str


class Reporter:
    """`run` is the loop; `wake` asks for a report at once, or as soon as the last one is BREATH_S old."""

    def __init__(
        self,
        target: ReportTarget,
        *,
        book: LoadBook,
        describe: Callable[[LoadSums], WorkerStatusReport],
        on_fenced: Callable[[], None],
        lease: Lease,
        session: aiohttp.ClientSession,
        clock: Clock,
    ) -> None:
        """on_fenced: another has taken this worker's name, as a control plane says; nothing more is to be served."""
        self._target = target
        self._book = book
        self._describe = describe
        self._on_fenced = on_fenced
        self._lease = lease
        self._session = session
        self._clock = clock
        self._wake = anyio.Event()
        self._last_sent: WorkerStatusReport | None = None
        self._last_at = float("-inf")
        self._urls = target.report_urls  # the one that took a report last comes first

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self.report_once()
            await self._clock.sleep(BREATH_S)
            with anyio.move_on_after(TICK_S):
                await self._wake.wait()
            self._wake = anyio.Event()

    async def report_once(self) -> None:
        """Send what is due: a status, and finished requests."""
        sums = self._book.draft()
        report = self._describe(sums)
        now = self._clock.monotonic()
        if is_due(
            is_changed=report != self._last_sent, since_last_s=now - self._last_at, is_loaded=report.loadtime > 0
        ) and await self._post("/worker_status/", report):
            self._book.delivered(sums)
            # Delivered sums are zero in the next draft: compare with what an unchanged state would look like.
            self._last_sent = msgspec.structs.replace(report, new_load=0.0, rej_load=0.0, cur_perf=0.0)
            self._last_at = now
        finished = self._book.unreported()
        if finished:
            body = FinishedRequests(
                worker_id=self._target.worker_id,
                mtoken=self._target.mtoken,
                requests=finished,
                incarnation=self._target.incarnation,
            )
            if await self._post("/delete_requests/", body):
                self._book.reported(finished)

    async def _post(self, path: str, body: msgspec.Struct) -> bool:
        """True when any control plane took it; tries each address once. What it grants renews the lease."""
        encoded = msgspec.json.encode(body)
        timeout = TIMEOUT if len(self._urls) == 1 else TIMEOUT_OF_SEVERAL
        for base in self._urls:
            sent_at = self._clock.monotonic()
            try:
                async with self._session.post(
                    f"{base}{path}", data=encoded, headers={"Content-Type": "application/json"}, timeout=timeout
                ) as answer:
                    if answer.status // 100 == 2:
                        self._urls = (base, *(other for other in self._urls if other != base))
                        self._lease.renew(sent_at=sent_at, serve_for_s=_granted(await answer.read()))
                        return True
                    log.warning("report.refused", path=path, status=answer.status)
                    if answer.status == Fenced.status:
                        self._on_fenced()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.debug("report.failed", path=path, why=str(error) or type(error).__name__)
        return False


def _granted(answer: bytes) -> float:
    """Seconds; 0 in the answer of a control plane that grants nothing."""
    try:
        return msgspec.json.decode(answer, type=ReportTaken).serve_for_s
    except msgspec.DecodeError:
        return 0.0

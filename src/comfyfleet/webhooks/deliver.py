"""Deliver what the outbox holds: at least once, under one id, over hours, and then into the dead letters.

A receiver has accepted when it answers 2xx. 410 means "stop": dead at once, as is an address we may not go to. All
else, a redirect included, is tried again by `retry.HOURS`, no sooner than a `Retry-After` asks. Deliveries run side by
side, so a receiver that hangs holds up nobody else; one host gets at most two at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from comfyfleet.clock import Clock
from comfyfleet.fetching.fetcher import GuardedFetcher, Posted
from comfyfleet.ids import Ids
from comfyfleet.retry import HOURS, SHORT, Backoff
from comfyfleet.webhooks import envelope
from comfyfleet.webhooks.outbox import Delivery, EventState, Outbox, OutgoingEvent, Receiver
from comfyfleet.wire.errors import FleetError, InputRefused, NotFound

log = structlog.get_logger(__name__)

# News that is stale in a minute is not worth a day of attempts.
PASSING_EVENTS = frozenset({"job.progress", "job.started"})
_AT_ONCE = 16
_PER_HOST = 2
_KEEP_S = 7 * 24 * 3600.0
_LONGEST_SLEEP_S = 60.0
_AFTER_FAILURE_S = 5.0
_MAX_TIMEOUT_S = 120.0


def next_step(
    posted: Posted | None, refused: bool, attempt: int, policy: Backoff, ids: Ids
) -> tuple[EventState, float]:
    """What an attempt leads to, and in how many seconds the next one is due. `attempt` counts from 1."""
    if posted is not None and 200 <= posted.status < 300:
        return EventState.DELIVERED, 0.0
    if refused or (posted is not None and posted.status == 410) or attempt >= policy.attempts:
        return EventState.DEAD, 0.0
    wait_s = next(islice(policy.delays(ids), attempt - 1, None))
    asked_s = (posted.retry_after_s or 0.0) if posted is not None else 0.0
    return EventState.WAITING, max(wait_s, min(asked_s, policy.cap_s))


class Webhooks:
    """Send, test, replay, list. `run` is the loop; it ends when its scope is cancelled."""

    def __init__(
        self,
        outbox: Outbox,
        fetcher: GuardedFetcher,
        clock: Clock,
        ids: Ids,
        *,
        trusted: GuardedFetcher | None = None,
        policy: Backoff = HOURS,
        ended: Callable[[OutgoingEvent], None] = lambda event: None,
    ) -> None:
        """ended: hears of each event that its receiver has, or that is given up."""
        self._outbox = outbox
        self._fetcher = fetcher
        self._trusted = trusted or fetcher
        self._clock = clock
        self._ids = ids
        self._policy = policy
        self._ended = ended
        self._wake = anyio.Event()
        self._under_way: set[str] = set()
        self._per_host: Counter[str] = Counter()

    async def send(
        self, receiver: Receiver, body: bytes, *, scope: str, job: str, event: str, occurrence: str = ""
    ) -> str:
        """Promise durably to tell `receiver`; returns the event's id, the same for the same occurrence.

        Raises InputRefused for a URL that can never be told.
        """
        host = self._fetcher_for(receiver).check_url(receiver.url).host or ""
        identity = envelope.event_id(scope, job, event, occurrence, receiver.url)
        await anyio.to_thread.run_sync(
            lambda: self._outbox.add(
                identity,
                scope=scope,
                job=job,
                event=event,
                host=host,
                receiver=receiver,
                body=body,
                now=self._clock.now(),
            )
        )
        self._nudge()
        return identity

    async def has_ended(self, identity: str) -> bool:
        """A promised event was delivered, or given up."""
        return await anyio.to_thread.run_sync(self._outbox.state, identity) in (EventState.DELIVERED, EventState.DEAD)

    async def test(self, receiver: Receiver, body: bytes) -> Delivery:
        """Post once, now, outside the outbox, and say what happened."""
        identity = envelope.event_id("test", self._ids.request_id())
        delivery, _ = await self._attempt(identity, "webhook.test", receiver, body, attempt=1)
        return delivery

    async def replay(self, identity: str, *, scope: str | None) -> None:
        """Tell an event again. Raises NotFound."""
        now = self._clock.now()
        if not await anyio.to_thread.run_sync(lambda: self._outbox.replay(identity, scope=scope, now=now)):
            raise NotFound("there is no such webhook event")
        self._nudge()

    async def events(self, *, scope: str | None, job: str = "", state: EventState | None = None) -> list[OutgoingEvent]:
        """The newest events of a scope (None: of all), for the delivery log and the dead letters."""
        return await anyio.to_thread.run_sync(lambda: self._outbox.events(scope=scope, job=job, state=state))

    async def deliveries(self, identities: Iterable[str]) -> list[Delivery]:
        """Every attempt made for these events."""
        wanted = list(identities)
        return await anyio.to_thread.run_sync(lambda: self._outbox.deliveries(wanted))

    async def run(self) -> None:
        """Deliver for ever."""
        async with anyio.create_task_group() as deliveries:
            while True:
                self._wake = anyio.Event()
                try:
                    now = self._clock.now()
                    await self._start_due(deliveries, now)
                    await self._rest(now)
                except Exception:
                    log.exception("webhook.loop_failed")
                    await self._clock.sleep(_AFTER_FAILURE_S)

    async def _start_due(self, deliveries: TaskGroup, now: float) -> None:
        is_more = True
        while is_more and len(self._under_way) < _AT_ONCE:
            busy = [host for host, count in self._per_host.items() if count >= _PER_HOST]
            found = await anyio.to_thread.run_sync(self._outbox.due, now, 4 * _AT_ONCE, busy)
            started = [event for event in found if self._start(event, deliveries)]
            # As many as were asked for may all be one host's; behind them is somebody else's.
            is_more = bool(started) and len(found) == 4 * _AT_ONCE
        await anyio.to_thread.run_sync(self._outbox.prune, now - _KEEP_S)

    def _start(self, event: OutgoingEvent, deliveries: TaskGroup) -> bool:
        """Where there is room for it and it is not on its way already."""
        is_full = len(self._under_way) >= _AT_ONCE or self._per_host[event.host] >= _PER_HOST
        if is_full or event.id in self._under_way:
            return False
        self._under_way.add(event.id)
        self._per_host[event.host] += 1
        deliveries.start_soon(self._deliver, event, name=f"webhook {event.id}")
        return True

    async def _rest(self, looked_at: float) -> None:
        """Until something that was not due at `looked_at` is, something new comes, or a delivery ends."""
        next_at = await anyio.to_thread.run_sync(self._outbox.next_at, looked_at)
        wait_s = _LONGEST_SLEEP_S
        if next_at is not None:
            wait_s = min(wait_s, max(0.0, next_at - self._clock.now()))
        wake = self._wake
        async with anyio.create_task_group() as either:

            async def sleep() -> None:
                await self._clock.sleep(wait_s)
                either.cancel_scope.cancel()

            either.start_soon(sleep)
            await wake.wait()
            either.cancel_scope.cancel()

    async def _deliver(self, event: OutgoingEvent) -> None:
        try:
            attempt = event.attempts + 1
            if event.receiver is None:
                delivery, state, wait_s = self._unopened(event, attempt), EventState.DEAD, 0.0
            else:
                delivery, (state, wait_s) = await self._attempt(
                    event.id, event.event, event.receiver, event.body, attempt=attempt
                )
            next_at = self._clock.now() + wait_s
            await anyio.to_thread.run_sync(lambda: self._outbox.record(delivery, state=state, next_at=next_at))
            log.info(
                "webhook.attempted",
                job=event.job,
                webhook_event=event.id,
                host=event.host,
                attempt=attempt,
                status=delivery.status,
                reason=delivery.reason,
                state=state.value,
                took_s=round(delivery.took_s, 3),
            )
            if state is not EventState.WAITING:
                self._ended(event)
        except Exception:
            # The file could not be written: the attempt is not logged, so it will be made again.
            log.exception("webhook.record_failed", webhook_event=event.id)
            await self._clock.sleep(_AFTER_FAILURE_S)
        finally:
            self._under_way.discard(event.id)
            self._per_host[event.host] -= 1
            if not self._per_host[event.host]:
                del self._per_host[event.host]
            self._nudge()

    async def _attempt(
        self, identity: str, event: str, receiver: Receiver, body: bytes, *, attempt: int
    ) -> tuple[Delivery, tuple[EventState, float]]:
        began, now = self._clock.monotonic(), self._clock.now()
        posted, refused, reason = None, False, ""
        try:
            posted = await self._fetcher_for(receiver).post(
                receiver.url,
                body,
                headers=envelope.headers(event, identity, body, secrets=receiver.secrets, now_s=now),
                timeout_s=min(receiver.timeout_s, _MAX_TIMEOUT_S),
            )
        except FleetError as problem:
            reason, refused = problem.message, isinstance(problem, InputRefused)
        delivery = Delivery(
            event_id=identity,
            attempt=attempt,
            at=now,
            took_s=self._clock.monotonic() - began,
            status=posted.status if posted else None,
            reason=reason or (f"answered {posted.status}" if posted else ""),
            excerpt=posted.excerpt[:200] if posted else "",
        )
        policy = SHORT if event in PASSING_EVENTS else self._policy
        return delivery, next_step(posted, refused, attempt, policy, self._ids)

    def _fetcher_for(self, receiver: Receiver) -> GuardedFetcher:
        return self._trusted if receiver.trusted else self._fetcher

    def _unopened(self, event: OutgoingEvent, attempt: int) -> Delivery:
        reason = "the receiver was sealed with a key that is gone"
        return Delivery(
            event_id=event.id, attempt=attempt, at=self._clock.now(), took_s=0.0, status=None, reason=reason, excerpt=""
        )

    def _nudge(self) -> None:
        self._wake.set()

"""At least once, under one id, for hours; then a dead letter that can be told again. Real posts, a fake clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from aiohttp import web
from standardwebhooks import Webhook

from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.fetcher import GuardedFetcher, Posted
from comfyfleet.ids import SeededIds
from comfyfleet.retry import HOURS
from comfyfleet.sealing import Sealer
from comfyfleet.testing.clock import FakeClock
from comfyfleet.webhooks.deliver import Webhooks, next_step
from comfyfleet.webhooks.outbox import EventState, Outbox, Receiver
from comfyfleet.wire.errors import InputRefused, NotFound

pytestmark = pytest.mark.anyio

Answer = Callable[[int], web.Response]


@dataclass
class AReceiver:
    """A server that answers as told and remembers each call's id, event and body; `called` is set at each."""

    answer: Answer
    calls: list[tuple[str, str, bytes]] = field(default_factory=list)
    called: anyio.Event = field(default_factory=anyio.Event)
    url: str = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.calls.append((request.headers["webhook-id"], request.headers["X-Comfyfleet-Event"], await request.read()))
        self.called.set()
        self.called = anyio.Event()
        return self.answer(len(self.calls))

    async def until(self, count: int) -> None:
        with anyio.fail_after(10):
            while len(self.calls) < count:
                await self.called.wait()


@asynccontextmanager
async def a_receiver(answer: Answer):
    receiver = AReceiver(answer)
    runner = web.ServerRunner(web.Server(receiver.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook?token=secret-in-url"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@dataclass
class AWorld:
    path: Path
    clock: FakeClock

    @asynccontextmanager
    async def webhooks(self, *allowed: str, running: bool = True):
        outbox = Outbox(self.path / "webhooks.sqlite3", Sealer(b"k" * 32, "webhooks"))
        async with (
            GuardedFetcher(AddressRules.parse(allowed or ("127.0.0.1",)), self.clock) as fetcher,
            anyio.create_task_group() as loops,
        ):
            webhooks = Webhooks(outbox, fetcher, self.clock, SeededIds(1))
            if running:
                loops.start_soon(webhooks.run)
            yield webhooks
            loops.cancel_scope.cancel()
        outbox.close()

    async def later(self, seconds: float) -> None:
        """Let time pass in one leap: the loop wakes once a minute, and nobody wants to watch that for hours."""
        self.clock.jump(seconds)
        await self.clock.advance(61)

    async def settled(self, webhooks: Webhooks, identity: str, state: EventState, *, attempts: int | None = None):
        """Wait until the event is in `state` (it is written after the receiver has answered)."""
        with anyio.fail_after(10):
            while True:
                [event] = [one for one in await webhooks.events(scope="s") if one.id == identity]
                if event.state is state and attempts in (None, event.attempts):
                    return event
                await anyio.wait_all_tasks_blocked()


@pytest.fixture
def world(tmp_path: Path, clock: FakeClock) -> AWorld:
    return AWorld(tmp_path, clock)


async def send(webhooks: Webhooks, receiver: AReceiver, event: str = "job.completed", **more) -> str:
    to = Receiver(url=receiver.url, secrets=("whsec_" + "c2VjcmV0" * 4,))
    return await webhooks.send(to, b'{"id":"job-1"}', scope="s", job="job-1", event=event, **more)


async def test_an_accepted_event_is_told_once(world: AWorld) -> None:
    async with a_receiver(lambda _: web.Response(status=204)) as receiver, world.webhooks() as webhooks:
        first = await send(webhooks, receiver)
        await world.settled(webhooks, first, EventState.DELIVERED)
        again = await send(webhooks, receiver)
        await world.later(100_000)

    assert first == again
    assert [call[0] for call in receiver.calls] == [first]


@pytest.mark.parametrize("status", [500, 503, 404, 301, 307])
async def test_a_receiver_that_fails_is_told_again_later_under_the_same_id(world: AWorld, status: int) -> None:
    def third_time_lucky(count: int) -> web.Response:
        return web.Response(status=200 if count == 3 else status, headers={"Location": "/elsewhere"})

    async with a_receiver(third_time_lucky) as receiver, world.webhooks() as webhooks:
        identity = await send(webhooks, receiver)
        for attempt, wait_s in ((1, 5.0), (2, 20.0)):
            await world.settled(webhooks, identity, EventState.WAITING, attempts=attempt)
            await world.clock.advance(wait_s)
        event = await world.settled(webhooks, identity, EventState.DELIVERED)
        log = await webhooks.deliveries([identity])

    assert [call[0] for call in receiver.calls] == [identity] * 3
    assert event.attempts == 3
    assert [one.status for one in log] == [status, status, 200]


async def test_a_receiver_that_hangs_holds_up_nobody_however_much_waits_for_it(world: AWorld) -> None:
    hangs = Receiver(url="http://localhost:9/hook")
    async with (
        a_receiver(lambda _: web.Response(status=204)) as receiver,
        world.webhooks("127.0.0.1", "localhost", running=False) as webhooks,
        anyio.create_task_group() as loops,
    ):
        post = webhooks._fetcher.post

        async def post_or_hang(url, *given, **named):
            if "localhost" in url:
                await anyio.sleep_forever()
            return await post(url, *given, **named)

        webhooks._fetcher.post = post_or_hang
        for number in range(100):
            await webhooks.send(hangs, b"{}", scope="s", job=str(number), event="job.completed")
        world.clock.jump(1)
        last = await send(webhooks, receiver)
        loops.start_soon(webhooks.run)
        await receiver.until(1)
        loops.cancel_scope.cancel()

    assert [call[0] for call in receiver.calls] == [last]


async def test_gone_means_stop(world: AWorld) -> None:
    async with a_receiver(lambda _: web.Response(status=410)) as receiver, world.webhooks() as webhooks:
        identity = await send(webhooks, receiver)
        event = await world.settled(webhooks, identity, EventState.DEAD)
        await world.later(100_000)

    assert (len(receiver.calls), event.reason) == (1, "answered 410")


async def test_after_all_attempts_it_is_a_dead_letter_and_can_be_replayed(world: AWorld) -> None:
    async with (
        a_receiver(lambda count: web.Response(status=500 if count <= HOURS.attempts else 200)) as receiver,
        world.webhooks() as webhooks,
    ):
        identity = await send(webhooks, receiver)
        dead = []
        with anyio.fail_after(20):
            while not dead:
                await world.later(HOURS.cap_s)
                dead = await webhooks.events(scope="s", state=EventState.DEAD)
        with pytest.raises(NotFound):
            await webhooks.replay(identity, scope="another key's")
        await webhooks.replay(identity, scope="s")
        await world.settled(webhooks, identity, EventState.DELIVERED)

    assert [(event.id, event.attempts) for event in dead] == [(identity, HOURS.attempts)]
    assert len(receiver.calls) == HOURS.attempts + 1
    assert len({call[0] for call in receiver.calls}) == 1


async def test_a_receiver_that_hangs_holds_up_nobody_else(world: AWorld) -> None:
    release = anyio.Event()

    async def hang(request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    runner = web.ServerRunner(web.Server(hang))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.2", 0).start()
    url = f"http://127.0.0.2:{runner.addresses[0][1]}/"
    async with a_receiver(lambda _: web.Response()) as receiver, world.webhooks("127.0.0.0/8") as webhooks:
        stuck = [
            await webhooks.send(Receiver(url=url), b"{}", scope="s", job=f"stuck-{number}", event="job.completed")
            for number in range(4)
        ]
        identity = await send(webhooks, receiver)
        await world.settled(webhooks, identity, EventState.DELIVERED)
        waiting = {event.id for event in await webhooks.events(scope="s", state=EventState.WAITING)}
        release.set()
    await runner.cleanup()

    assert waiting == set(stuck)


async def test_a_restart_forgets_nothing(world: AWorld) -> None:
    async with a_receiver(lambda _: web.Response()) as receiver:
        async with world.webhooks(running=False) as webhooks:
            promised = await send(webhooks, receiver)
        assert receiver.calls == []
        async with world.webhooks() as webhooks:
            again = await send(webhooks, receiver)
            await world.settled(webhooks, promised, EventState.DELIVERED)

    assert promised == again
    assert [call[0] for call in receiver.calls] == [promised]


async def test_neither_url_nor_secret_can_be_read_from_the_file(world: AWorld) -> None:
    async with a_receiver(lambda _: web.Response()) as receiver, world.webhooks(running=False) as webhooks:
        await send(webhooks, receiver)
        content = b"".join(path.read_bytes() for path in world.path.iterdir())

    assert b"job-1" in content
    assert b"secret-in-url" not in content
    assert b"c2VjcmV0" not in content
    assert (world.path / "webhooks.sqlite3").stat().st_mode & 0o777 == 0o600


async def test_a_receiver_on_a_private_address_is_refused_at_once(world: AWorld) -> None:
    async with world.webhooks("10.0.0.1") as webhooks:
        with pytest.raises(InputRefused):
            await webhooks.send(Receiver(url="http://127.0.0.1:1/"), b"{}", scope="s", job="j", event="job.failed")


async def test_news_of_progress_is_not_retried_for_hours(world: AWorld) -> None:
    async with a_receiver(lambda _: web.Response(status=500)) as receiver, world.webhooks() as webhooks:
        identity = await send(webhooks, receiver, "job.progress", occurrence="1")
        for attempt, wait_s in enumerate((0.1, 0.2, 0.4, 0.8, 1.6), start=1):
            await world.settled(webhooks, identity, EventState.WAITING, attempts=attempt)
            await world.clock.advance(wait_s)
        event = await world.settled(webhooks, identity, EventState.DEAD)

    assert event.attempts == 6


async def test_a_test_call_is_signed_and_says_what_happened(world: AWorld) -> None:
    async with a_receiver(lambda _: web.Response(status=418, text="teapot")) as receiver, world.webhooks() as webhooks:
        delivery = await webhooks.test(Receiver(url=receiver.url, secrets=("plain",)), b'{"id":"test"}')

    assert (delivery.status, delivery.excerpt) == (418, "teapot")
    assert receiver.calls[0][1:] == ("webhook.test", b'{"id":"test"}')


async def test_what_arrives_is_verified_by_the_standard_library(world: AWorld, clock: FakeClock) -> None:
    clock.jump(time.time() - clock.now())
    arrived = []

    async def receive(request: web.Request) -> web.Response:
        arrived.append((dict(request.headers), await request.read()))
        return web.Response()

    runner = web.ServerRunner(web.Server(receive))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    secret = "whsec_" + "c2VjcmV0" * 4
    async with world.webhooks() as webhooks:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        identity = await webhooks.send(
            Receiver(url=url, secrets=(secret,)),
            json.dumps({"id": "j"}).encode(),
            scope="s",
            job="j",
            event="job.failed",
        )
        await world.settled(webhooks, identity, EventState.DELIVERED)
    await runner.cleanup()

    headers, body = arrived[0]
    assert Webhook(secret).verify(body, headers) == {"id": "j"}


def test_waits_grow_over_about_a_day_and_honour_what_the_receiver_asks() -> None:
    failing = Posted(status=500, retry_after_s=None, excerpt="")
    busy = Posted(status=503, retry_after_s=3000.0, excerpt="")

    waits = [next_step(failing, False, attempt, HOURS, SeededIds(3))[1] for attempt in range(1, HOURS.attempts)]
    assert 8 * 3600 < sum(waits) < 36 * 3600
    assert next_step(busy, False, 1, HOURS, SeededIds(3)) == (EventState.WAITING, 3000.0)
    assert next_step(failing, False, HOURS.attempts, HOURS, SeededIds(3))[0] is EventState.DEAD
    assert next_step(None, True, 1, HOURS, SeededIds(3))[0] is EventState.DEAD

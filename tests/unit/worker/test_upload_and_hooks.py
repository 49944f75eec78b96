"""Files come in by multipart and are known by content; a webhook's log can be read, replayed and tested."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from fastapi import FastAPI

from comfyfleet.clock import SystemClock
from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.ids import SystemIds
from comfyfleet.settings.outreach import FetchSettings, WebhookSettings
from comfyfleet.settings.storage import StorageSettings
from comfyfleet.web import worker_error
from comfyfleet.webhooks.receivers import check_receiver, receiver_of
from comfyfleet.wire.errors import FleetError, InputRefused
from comfyfleet.wire.generation import GenerateResult, WebhookTarget
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.api.files_and_hooks import routes
from comfyfleet.worker.job import RunEvent
from comfyfleet.worker.stages.kit import KitPlaces, open_kit

pytestmark = pytest.mark.anyio

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@asynccontextmanager
async def a_wrapper(folder: Path, *, upload_max_bytes: int = 10_000_000, webhook: WebhookSettings | None = None):
    places = KitPlaces(
        output=folder / "output",
        engine_input=folder / "input",
        outbox=folder / "hooks.sqlite3",
        uploads=folder / "uploads.sqlite3",
        key=b"k" * 32,
    )
    async with open_kit(
        places,
        StorageSettings(),
        webhook or WebhookSettings(),
        FetchSettings(allowed_private_hosts=("127.0.0.1",)),
        clock=SystemClock(),
        ids=SystemIds(),
    ) as kit:
        app = FastAPI()
        app.include_router(routes(kit, upload_max_bytes=upload_max_bytes))
        app.add_exception_handler(FleetError, lambda _, error: worker_error(error))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://wrapper") as client:
            yield client, kit


@asynccontextmanager
async def a_receiver(status: int = 200):
    calls = []

    async def handle(request: web.Request) -> web.Response:
        calls.append(await request.json())
        return web.Response(status=status, text="got it")

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/", calls
    finally:
        await runner.cleanup()


async def test_an_upload_is_named_by_its_content_and_can_be_loaded(tmp_path: Path) -> None:
    async with a_wrapper(tmp_path) as (client, _):
        first = (await client.post("/upload", files={"image": ("../cat.PNG", PNG)})).json()
        again = (await client.post("/upload", files={"file": ("other.png", PNG)})).json()

    assert first["value"] == again["value"] == f"comfyfleet/{hashlib.sha256(PNG).hexdigest()[:40]}.png"
    assert (first["type"], first["subfolder"], first["size_bytes"]) == ("input", "comfyfleet", len(PNG))
    assert (first["mime"], first["filename"]) == ("image/png", "../cat.PNG")
    assert (tmp_path / "input" / first["value"]).read_bytes() == PNG


async def test_several_files_and_plain_fields_may_come_in_one_body(tmp_path: Path) -> None:
    async with a_wrapper(tmp_path) as (client, _):
        body = [("a", ("a.png", PNG)), ("b", ("b.txt", b"words"))]
        answer = await client.post("/upload", files=body, data={"overwrite": "true"})

    assert [one["filename"] for one in answer.json()["files"]] == ["a.png", "b.txt"]


async def test_an_upload_over_the_limit_leaves_nothing(tmp_path: Path) -> None:
    async with a_wrapper(tmp_path, upload_max_bytes=1000) as (client, _):
        answer = await client.post("/upload", files={"a": ("a.bin", bytes(5000))})

    assert answer.status_code == 413
    assert not [path for path in (tmp_path / "input").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/json"),
        (b"", "multipart/form-data"),
        (b"rubbish", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\ncut of", "multipart/form-data; boundary=x"),
    ],
)
async def test_a_body_that_is_no_upload_is_refused(tmp_path: Path, content: bytes, kind: str) -> None:
    async with a_wrapper(tmp_path) as (client, _):
        answer = await client.post("/upload", content=content, headers={"Content-Type": kind})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
    assert not [path for path in (tmp_path / "input").rglob("*") if path.is_file()]


async def test_the_delivery_log_shows_what_happened_and_no_secret(tmp_path: Path) -> None:
    async with a_receiver(410) as (url, calls), a_wrapper(tmp_path) as (client, kit):
        target = WebhookTarget(url=url + "?token=t0p", secret="s3cret", extra_params={"user": 1})
        result = GenerateResult(id="job-1", message="m", status="completed")
        identity = await kit.notify.finished(result, target, scope="")
        while (await client.get("/webhooks", params={"state": "dead"})).json() == []:
            pass
        [event] = (await client.get("/webhooks", params={"job": "job-1"})).json()
        replayed = await client.post(f"/webhooks/{identity}/replay")
        unknown = await client.post("/webhooks/evt_none/replay")

    assert (event["id"], event["state"], event["host"]) == (identity, "dead", "127.0.0.1")
    assert [(one["status"], one["excerpt"]) for one in event["deliveries"]] == [(410, "got it")]
    assert "t0p" not in str(event)
    assert "s3cret" not in str(event)
    assert calls[0]["extra"] == {"user": 1}
    assert (replayed.status_code, unknown.status_code) == (202, 404)


async def test_the_operator_sees_and_replays_events_of_jobs_that_came_behind_a_ticket(tmp_path: Path) -> None:
    async with a_receiver(410) as (url, _), a_wrapper(tmp_path) as (client, kit):
        result = GenerateResult(id="job-1", message="m", status="completed")
        ids = {scope: await kit.notify.finished(result, WebhookTarget(url=url), scope=scope) for scope in ("", "key-7")}
        every = (await client.get("/webhooks")).json()
        one = (await client.get("/webhooks", params={"scope": "key-7"})).json()
        own = (await client.get("/webhooks", params={"scope": ""})).json()
        replayed = await client.post(f"/webhooks/{ids['key-7']}/replay")

    assert {(event["id"], event["scope"]) for event in every} == {(ids[""], ""), (ids["key-7"], "key-7")}
    assert [event["id"] for event in one] == [ids["key-7"]]
    assert [event["id"] for event in own] == [ids[""]]
    assert replayed.status_code == 202


async def test_the_operators_own_receiver_may_be_named_wherever_it_is_and_no_other_private_one(tmp_path: Path) -> None:
    operator = WebhookSettings(url="http://10.0.0.7/hook", secrets=("s",))
    async with GuardedFetcher(AddressRules(), SystemClock()) as fetcher:
        check_receiver(WebhookTarget(url=operator.url), operator, fetcher, field="webhook")
        check_receiver(WebhookTarget(), operator, fetcher, field="webhook")
        for url in ("http://10.0.0.8/hook", "http://10.0.0.7/other"):
            with pytest.raises(InputRefused):
                check_receiver(WebhookTarget(url=url), operator, fetcher, field="webhook")

    assert receiver_of(WebhookTarget(url=operator.url), operator).trusted
    assert receiver_of(WebhookTarget(), operator).trusted
    assert not receiver_of(WebhookTarget(url="https://example.com/"), operator).trusted


async def test_a_webhook_can_be_tried_before_it_is_used(tmp_path: Path) -> None:
    async with a_receiver() as (url, calls), a_wrapper(tmp_path, webhook=WebhookSettings(url=url)) as (client, _):
        own = await client.post("/webhooks/test", json={"url": url, "secret": "s"})
        operators = await client.post("/webhooks/test")
        private = await client.post("/webhooks/test", json={"url": "http://10.0.0.1/"})
        shape = await client.post("/webhooks/test", json={"url": 5})

    assert (own.json()["status"], operators.json()["status"]) == (200, 200)
    assert [call["id"] for call in calls] == ["test", "test"]
    assert (private.status_code, shape.status_code) == (422, 400)


async def test_without_any_webhook_there_is_nothing_to_try(tmp_path: Path) -> None:
    async with a_wrapper(tmp_path) as (client, _):
        assert (await client.post("/webhooks/test")).status_code == 400


def a_log() -> AsyncIterator[RunEvent]:
    """What a job's log holds: queued, begun, and three steps in half a second."""

    async def events() -> AsyncIterator[RunEvent]:
        yield RunEvent(number=1, at=1.0, status=RunStatus.QUEUED, message="Waiting.")
        yield RunEvent(number=2, at=2.0, status=RunStatus.GENERATING, message="Generating.")
        for step in range(3):
            yield RunEvent(number=3 + step, at=2.1 + step / 10, status=RunStatus.GENERATING, message="s", progress=50.0)

    return events()


async def test_progress_is_told_only_when_asked_for_and_not_at_every_step(tmp_path: Path) -> None:
    async with a_receiver() as (url, _), a_wrapper(tmp_path) as (client, kit):
        for job, asked in {"a": (), "b": ("completed",), "c": ("progress",), "d": ("started", "progress")}.items():
            await kit.notify.follow(a_log(), job, WebhookTarget(url=url, events=asked), scope="")
        told = [(event["job"], event["event"]) for event in (await client.get("/webhooks")).json()]

    assert sorted(told) == [("c", "job.progress"), ("d", "job.started")]

"""Files into a running worker, files out of it, and the world told: over HTTP, with real processes and a real S3."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import anyio
import pytest
from aiohttp import web
from PIL import Image
from standardwebhooks import Webhook

from comfyfleet.testing.processes import a_worker, picture
from comfyfleet.testing.s3_server import s3_server

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(280)]

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@dataclass
class ASite:
    """Gives out a picture, and takes webhooks; `status` is what it answers to those."""

    picture: bytes
    base_url: str = ""
    status: int = 200
    fetched: list[str] = field(default_factory=list)
    told: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    news: anyio.Event = field(default_factory=anyio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            self.fetched.append(request.path)
            return web.Response(body=self.picture)
        self.told.append((dict(request.headers), await request.read()))
        self.news.set()
        self.news = anyio.Event()
        return web.Response(status=self.status)

    async def until_told(self, count: int) -> list[dict]:
        with anyio.fail_after(60):
            while len(self.told) < count:
                await self.news.wait()
        return [json.loads(body) for _, body in self.told]


@asynccontextmanager
async def a_site():
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(out, "PNG")
    site = ASite(out.getvalue())
    runner = web.ServerRunner(web.Server(site.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield site
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
async def worker(tmp_path_factory):
    """A worker that may reach this machine: here are the tests' own servers."""
    env = {"COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1", "WEBHOOK_SECRET": SECRET}
    async with a_worker(tmp_path_factory.mktemp("worker"), **env) as running:
        yield running


def reworked(value: object, title: str = "") -> dict:
    """Load a picture, save it."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": value}, "_meta": {"title": title}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "day/reworked"}},
    }


async def fetched(url: str, **headers: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.read()


async def test_an_input_by_url_is_fetched_and_a_title_is_not(worker) -> None:
    async with a_site() as site:
        graph = reworked(f"{site.base_url}/cat.png", title=f"{site.base_url}/title.png")
        status, answer = await worker.generate(graph)

    assert (status, answer["status"]) == (200, "completed"), answer
    assert site.fetched == ["/cat.png"]


async def test_an_upload_can_be_used_by_a_job(worker) -> None:
    async with a_site() as site:
        form = aiohttp.FormData()
        form.add_field("image", site.picture, filename="cat.png", content_type="image/png")
        async with worker.session.post(f"{worker.base_url}/upload", data=form) as answer:
            uploaded = await answer.json()
        status, answer = await worker.generate(reworked(uploaded["value"]))

    assert uploaded["sha256"] == hashlib.sha256(site.picture).hexdigest()
    assert (status, answer["status"]) == (200, "completed"), answer


@pytest.mark.parametrize(
    "value", ["http://10.255.255.1/x.png", "http://169.254.169.254/latest", "/etc/hostname", "../../x.png", "data:x"]
)
async def test_an_input_that_may_not_be_had_is_refused_by_node_and_input(worker, value: str) -> None:
    before = await worker.renders()

    status, answer = await worker.generate(reworked(value))

    assert (status, answer["status"]) == (422, "failed")
    assert (answer["error"]["details"]["node_id"], answer["error"]["details"]["input"]) == ("1", "image")
    assert await worker.renders() == before


async def test_an_output_is_behind_a_link_that_only_opens_it(worker) -> None:
    status, answer = await worker.generate(picture(77, prefix="deep/er/blue"), request_id="linked")
    [output] = answer["output"]

    assert status == 200
    assert (output["subfolder"], output["kind"], output["mime"]) == ("deep/er", "image", "image/png")
    assert output["local_path"].endswith(f"/data/output/linked/deep/er/{output['filename']}")
    code, body = await fetched(output["url"])
    assert (code, hashlib.sha256(body).hexdigest()) == (200, output["sha256"])
    assert await fetched(output["url"], Range="bytes=0-3") == (206, body[:4])
    assert (await fetched(output["url"].replace("linked", "other")))[0] == 403
    assert (await fetched(output["url"].split("?")[0]))[0] == 403


async def test_base64_is_given_when_asked_for(worker) -> None:
    _, answer = await worker.generate(picture(78), return_outputs_as_base64=True)
    [output] = answer["output"]

    assert hashlib.sha256(base64.b64decode(output["data"])).hexdigest() == output["sha256"]
    assert output["mimetype"] == "image/png"


async def test_a_webhook_is_told_of_success_and_of_failure_in_both_dialects(worker) -> None:
    async with a_site() as site:
        hook = {"url": f"{site.base_url}/hook", "extra_params": {"user": "u1"}}
        await worker.generate(picture(79), webhook=hook, request_id="good")
        await worker.generate(picture(80, fault="error"), webhook=hook, request_id="bad")
        good, bad = sorted(await site.until_told(2), key=lambda body: body["status"])

    assert (good["id"], good["status"], good["extra"]) == ("good", "completed", {"user": "u1"})
    assert good["output"][0]["url"]
    assert (bad["id"], bad["status"]) == ("bad", "failed")
    assert list(good) == ["id", "status", "message", "output", "timings", "extra"]
    for headers, body in site.told:
        Webhook(SECRET).verify(body, headers)
        assert headers["X-Webhook-Signature"].startswith("sha256=")


async def test_a_webhook_is_told_of_progress_when_it_asks(worker) -> None:
    async with a_site() as site:
        hook = {"url": f"{site.base_url}/hook", "events": ["started", "progress"]}
        await worker.generate(picture(81, seconds=0.2), webhook=hook, request_id="curious")
        for told in itertools.count(2):  # however many tell of progress, and in whatever order they come
            bodies = await site.until_told(told)
            events = {headers["X-Comfyfleet-Event"] for headers, _ in site.told}
            if {"job.started", "job.completed"} <= events:
                break

    assert {body["id"] for body in bodies} == {"curious"}


async def test_a_private_webhook_is_refused_before_anything_is_done(worker) -> None:
    status, answer = await worker.generate(picture(82), webhook={"url": "http://192.168.3.4/"})

    assert (status, answer["error"]["code"]) == (422, "input_refused")


async def test_a_webhook_survives_kill_9(tmp_path) -> None:
    """The receiver is down when the job ends; the worker is killed; the next one tells, under the same id."""
    env = {"COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1", "WEBHOOK_SECRET": SECRET}
    async with a_site() as site, a_worker(tmp_path, **env) as worker:
        site.status = 503
        await worker.generate(picture(83), webhook={"url": f"{site.base_url}/hook"}, request_id="durable")
        await site.until_told(1)
        worker.kill()
        site.status = 200
        worker.start()
        await worker.until("/health")
        await site.until_told(2)

    ids = {headers["webhook-id"] for headers, _ in site.told}
    assert len(ids) == 1


async def test_outputs_go_to_the_environments_s3_and_to_the_requests(tmp_path) -> None:
    with s3_server(tmp_path / "s3") as s3:
        keys = {"access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key}
        env = {
            "S3_ACCESS_KEY_ID": s3.access_key_id,
            "S3_SECRET_ACCESS_KEY": s3.secret_access_key,
            "S3_BUCKET_NAME": s3.bucket,
            "S3_ENDPOINT_URL": s3.endpoint_url,
        }
        own = {**keys, "endpoint_url": s3.endpoint_url, "bucket_name": s3.bucket, "region": ""}
        empty = dict.fromkeys(own, "")
        async with a_worker(tmp_path / "one", **env) as worker:
            _, by_env = await worker.generate(picture(84, prefix="sub/x"), s3=empty, request_id="by-env")
            wrong = {**own, "secret_access_key": "wrong", "endpoint_url": ""}
            status, failed = await worker.generate(picture(85), s3=wrong, request_id="wrong")
            body_by_env = await fetched(by_env["output"][0]["url"])
            log = worker.log()
        async with a_worker(tmp_path / "two", COMFYFLEET_ALLOWED_PRIVATE_HOSTS="127.0.0.1") as worker:
            _, by_request = await worker.generate(picture(86), s3=own, request_id="by-request")
            body_by_request = await fetched(by_request["output"][0]["url"])

    for answer, (code, body), key in (
        (by_env, body_by_env, "/outputs/by-env/sub/"),
        (by_request, body_by_request, "/outputs/by-request/"),
    ):
        assert (code, hashlib.sha256(body).hexdigest()) == (200, answer["output"][0]["sha256"])
        assert key in answer["output"][0]["url"]
    assert (status, failed["status"]) == (200, "completed")
    assert failed["output"][0]["upload_error"]
    assert s3.secret_access_key not in log + json.dumps([by_env, failed, by_request])

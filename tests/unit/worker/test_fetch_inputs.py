"""Whatever a request points at becomes a file in the engine's input folder, known by its content."""

from __future__ import annotations

import base64
import hashlib
import io
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from aiohttp import web
from anyio.lowlevel import checkpoint
from PIL import Image

from comfyfleet.clock import SystemClock
from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.ids import SeededIds
from comfyfleet.sealing import Sealer
from comfyfleet.storage.long_uploads import long_uploads
from comfyfleet.storage.s3 import S3Storages
from comfyfleet.storage.upload_book import UploadBook
from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import FleetError, InputRefused, InputUnavailable, WorkflowRefused
from comfyfleet.wire.generation import GenerateInput, UrlCredential
from comfyfleet.worker.stages.destinations import Destinations
from comfyfleet.worker.stages.fetch_inputs import FetchInputs
from comfyfleet.worker.stages.input_store import KEEP_S, InputStore, evictable

pytestmark = pytest.mark.anyio


class QuickClock(SystemClock):
    """Waits between attempts are no test's concern."""

    async def sleep(self, seconds: float) -> None:
        await checkpoint()


def a_picture(colour: str = "teal", size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


@asynccontextmanager
async def a_site(routes: dict):
    """Serves bytes by path, or what a handler answers; `hits` lists (path, headers)."""
    hits = []

    async def answer(request: web.Request) -> web.StreamResponse:
        hits.append((request.path, dict(request.headers)))
        found = routes[request.path]
        if callable(found):
            return await found(request)
        tag = f'"{hashlib.sha256(found).hexdigest()[:8]}"'
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304)
        return web.Response(body=found, headers={"ETag": tag})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", hits
    finally:
        await runner.cleanup()


@asynccontextmanager
async def a_stage(folder: Path, *allowed: str, max_bytes: int = 1_000_000):
    clock = SystemClock()
    book = UploadBook(folder / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
    async with (
        GuardedFetcher(AddressRules.parse(allowed or ("127.0.0.1",)), clock) as fetcher,
        long_uploads(book, clock, SeededIds(1)) as long,
    ):
        destinations = Destinations(None, S3Storages(clock, long), fetcher, tunnel_url="")
        store = InputStore(folder, clock, max_bytes=max_bytes)
        yield FetchInputs(
            fetcher, store, destinations, max_bytes=max_bytes, timeout_s=10, clock=QuickClock(), ids=SeededIds(1)
        )


def a_graph(*values, node: str = "LoadImage", name: str = "image") -> dict:
    return {str(index): {"class_type": node, "inputs": {name: value}} for index, value in enumerate(values)}


def names(graph: dict) -> list[str]:
    return [value for node in graph.values() for value in node["inputs"].values()]


async def test_urls_become_files_of_the_input_folder(tmp_path: Path) -> None:
    async with a_site({"/cat.png": a_picture()}) as (url, _), a_stage(tmp_path) as stage:
        fetched = await stage.run(a_graph(f"{url}/cat.png", "kept.png"), GenerateInput())

    name, plain = names(fetched.graph)
    assert (tmp_path / name).read_bytes() == a_picture()
    assert name.startswith("comfyfleet/")
    assert name.endswith(".png")
    assert plain == "kept.png"
    assert fetched.files[0].sha256 == hashlib.sha256(a_picture()).hexdigest()


async def test_the_same_content_is_one_file_however_it_came(tmp_path: Path) -> None:
    encoded = base64.b64encode(a_picture()).decode()
    values = [f"data:image/png;base64,{encoded}", {"base64": encoded, "filename": "x.png"}]
    async with a_site({"/a": a_picture(), "/b": a_picture()}) as (url, _), a_stage(tmp_path) as stage:
        fetched = await stage.run(a_graph(f"{url}/a", f"{url}/b", *values), GenerateInput())

    assert len(set(names(fetched.graph))) == 1
    assert len(list((tmp_path / "comfyfleet").iterdir())) == 1


async def test_a_changed_file_behind_the_same_url_is_fetched_again(tmp_path: Path) -> None:
    site = {"/cat.png": a_picture("teal")}
    async with a_site(site) as (url, hits), a_stage(tmp_path) as stage:
        first = await stage.run(a_graph(f"{url}/cat.png"), GenerateInput())
        same = await stage.run(a_graph(f"{url}/cat.png"), GenerateInput())
        site["/cat.png"] = a_picture("red")
        other = await stage.run(a_graph(f"{url}/cat.png"), GenerateInput())

    assert names(first.graph) == names(same.graph) != names(other.graph)
    assert "If-None-Match" in hits[1][1]
    assert (tmp_path / names(other.graph)[0]).read_bytes() == a_picture("red")


async def test_inputs_are_fetched_side_by_side(tmp_path: Path) -> None:
    both = anyio.Event()
    waiting = []

    async def wait(request: web.Request) -> web.Response:
        waiting.append(request.path)
        if len(waiting) == 2:
            both.set()
        await both.wait()
        return web.Response(body=a_picture(request.path.strip("/")))

    async with a_site({"/red": wait, "/blue": wait}) as (url, _), a_stage(tmp_path) as stage:
        with anyio.fail_after(5):
            fetched = await stage.run(a_graph(f"{url}/red", f"{url}/blue"), GenerateInput())

    assert len(set(names(fetched.graph))) == 2


async def test_credentials_go_to_their_host_and_are_part_of_the_cache(tmp_path: Path) -> None:
    async def private(request: web.Request) -> web.Response:
        allowed = request.headers.get("Authorization") == "Bearer t"
        return web.Response(body=a_picture(), headers={"ETag": '"1"'}) if allowed else web.Response(status=403)

    async with a_site({"/p/cat.png": private}) as (url, hits), a_stage(tmp_path) as stage:
        key = UrlCredential(url_prefix=f"{url}/p", headers={"Authorization": "Bearer t"})
        await stage.run(a_graph(f"{url}/p/cat.png"), GenerateInput(credentials=(key,)))
        inline = {"url": f"{url}/p/cat.png", "headers": {"Authorization": "Bearer t"}}
        await stage.run(a_graph(inline), GenerateInput())
        with pytest.raises(InputUnavailable) as refusal:
            await stage.run(a_graph(f"{url}/p/cat.png"), GenerateInput())

    assert refusal.value.details["status"] == 403
    assert "If-None-Match" not in hits[2][1]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("data:image/png;base64,!!!", WorkflowRefused),
        ("data:image/png;base64,", WorkflowRefused),
        ("data:nonsense", WorkflowRefused),
        ({"base64": "aGVsbG8="}, WorkflowRefused),  # no picture
        ("http://10.0.0.1/x.png", InputRefused),
        ("http://localhost/x.png", InputRefused),
        ("s3://bucket/key.png", WorkflowRefused),  # no keys anywhere
        ("s3://bucket", WorkflowRefused),
    ],
)
async def test_a_bad_input_names_its_node_and_leaves_nothing(
    tmp_path: Path, value: object, error: type[FleetError]
) -> None:
    async with a_stage(tmp_path, "192.0.2.1") as stage:
        with pytest.raises(error) as refusal:
            await stage.run(a_graph(value), GenerateInput())

    assert refusal.value.status == 422
    assert refusal.value.details["node_id"] == "0"
    assert refusal.value.details["input"] == "image"
    assert not list(tmp_path.rglob(".part-*"))


async def test_a_web_page_is_no_picture(tmp_path: Path) -> None:
    async with a_site({"/cat.png": b"<!doctype html><html>sorry</html>"}) as (url, _), a_stage(tmp_path) as stage:
        with pytest.raises(WorkflowRefused, match="not image"):
            await stage.run(a_graph(f"{url}/cat.png"), GenerateInput())


async def test_a_picture_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    bomb = bytearray(a_picture())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height
    bomb[29:33] = __import__("zlib").crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    async with a_site({"/b.png": bytes(bomb)}) as (url, _), a_stage(tmp_path) as stage:
        with pytest.raises(WorkflowRefused):
            await stage.run(a_graph(f"{url}/b.png"), GenerateInput())


async def test_sound_may_come_in_a_film_and_a_latent_is_any_file(tmp_path: Path) -> None:
    film = b"\0\0\0\x18ftypmp42" + bytes(40)
    async with a_site({"/a.mp4": film, "/l.latent": b"latent bytes"}) as (url, _), a_stage(tmp_path) as stage:
        await stage.run(a_graph(f"{url}/a.mp4", node="LoadAudio", name="audio"), GenerateInput())
        latent = await stage.run(a_graph(f"{url}/l.latent", node="LoadLatent", name="latent"), GenerateInput())

    assert names(latent.graph)[0].endswith(".latent")


@pytest.mark.parametrize(("status", "asked"), [(503, 3), (429, 3), (404, 1), (403, 1)])
async def test_a_stumbling_host_is_asked_again_and_one_that_says_no_is_not(
    tmp_path: Path, status: int, asked: int
) -> None:
    async def stumble(request: web.Request) -> web.Response:
        return web.Response(body=a_picture()) if len(hits) == 3 else web.Response(status=status)

    async with a_site({"/a": stumble}) as (url, hits), a_stage(tmp_path) as stage:
        if asked == 3:
            await stage.run(a_graph(f"{url}/a"), GenerateInput())
        else:
            with pytest.raises(InputUnavailable):
                await stage.run(a_graph(f"{url}/a"), GenerateInput())

    assert len(hits) == asked


async def test_one_failing_input_stops_the_others(tmp_path: Path) -> None:
    never = anyio.Event()

    async def hang(request: web.Request) -> web.Response:
        await never.wait()
        return web.Response()

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=404)

    async with a_site({"/slow": hang, "/gone": refuse}) as (url, _), a_stage(tmp_path) as stage:
        with anyio.fail_after(5), pytest.raises(InputUnavailable):
            await stage.run(a_graph(f"{url}/slow", f"{url}/gone"), GenerateInput())
        never.set()


def test_the_oldest_files_go_first_and_none_that_may_be_in_use(clock: FakeClock) -> None:
    old = clock.now() - KEEP_S - 100
    files = [(old, 60, "old"), (old + 50, 60, "newer"), (clock.now(), 60, "in use")]

    assert evictable(files, 200, clock.now()) == []
    assert evictable(files, 130, clock.now()) == ["old"]
    assert evictable(files, 10, clock.now()) == ["old", "newer"]
    assert evictable([(old, 1, "/in/.part-dead"), (clock.now(), 1, "/in/.part-alive")], 200, clock.now()) == [
        "/in/.part-dead"
    ]

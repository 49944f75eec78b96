"""One contract over both stores: the same bytes come back through a signed link, and only through an untouched one."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.sealing import Sealer
from comfyfleet.settings.storage import WEEK_S, S3Settings
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.base import Storage
from comfyfleet.storage.local import LocalStorage
from comfyfleet.storage.long_uploads import long_uploads
from comfyfleet.storage.s3 import S3Storage
from comfyfleet.storage.serve import files_app
from comfyfleet.storage.upload_book import UploadBook
from comfyfleet.testing.clock import FakeClock
from comfyfleet.testing.s3_server import s3_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@dataclass
class AStore:
    """A store under test, and one whose links were all made a minute before they are used."""

    storage: Storage
    expired: Storage


@pytest.fixture(scope="module")
def a_local_store(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        clock, signer = SystemClock(), UrlSigner(b"k" * 32, SystemClock())
        app = Starlette(routes=[Mount("/files", files_app(root, signer))])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        earlier = FakeClock(clock.now() - 60)
        yield AStore(
            storage=LocalStorage(root, url, signer, clock),
            expired=LocalStorage(root, url, UrlSigner(b"k" * 32, earlier), earlier),
        )
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def an_s3_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    book = UploadBook(folder / "uploads.sqlite3", Sealer(b"k" * 32, "uploads"))
    with s3_server(folder) as server:
        settings = S3Settings(
            bucket=server.bucket,
            access_key_id=server.access_key_id,
            secret_access_key=server.secret_access_key,
            endpoint_url=server.endpoint_url,
        )
        async with long_uploads(book, SystemClock(), SystemIds()) as long:
            storage = S3Storage(settings, SystemClock(), long)
            yield AStore(storage=storage, expired=storage)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> AStore:
    return request.getfixturevalue({"local": "a_local_store", "s3": "an_s3_store"}[request.param])


def ask(url: str, **headers: str) -> tuple[int, Any, bytes]:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.headers, refusal.read()


def a_file(folder: Path, content: bytes, name: str = "file.bin") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("key", ["job-1/song.mp3", "job-1/day one/ünï%20cødé & more+.png", "job-1/a/b/c/d.bin"])
async def test_a_link_gives_the_same_bytes(store: AStore, tmp_path: Path, key: str) -> None:
    path = a_file(tmp_path, b"the bytes of " + key.encode())

    await store.storage.put(path, key, media_type="audio/mpeg")
    link = await store.storage.url(key, expires_in_s=60)

    status, _, body = ask(link.url)
    assert (status, body) == (200, path.read_bytes())


async def test_putting_a_key_again_replaces_it(store: AStore, tmp_path: Path) -> None:
    await store.storage.put(a_file(tmp_path, b"first", "1"), "job-2/x.bin", media_type="")
    await store.storage.put(a_file(tmp_path, b"second", "2"), "job-2/x.bin", media_type="")

    link = await store.storage.url("job-2/x.bin", expires_in_s=60)
    assert ask(link.url)[2] == b"second"


async def test_a_file_of_many_parts_arrives_whole(store: AStore, tmp_path: Path) -> None:
    content = bytes(range(256)) * (20 * 1024 * 1024 // 256) + b"end"
    await store.storage.put(a_file(tmp_path, content), "job-3/film.mp4", media_type="video/mp4")

    link = await store.storage.url("job-3/film.mp4", expires_in_s=60)
    status, headers, body = ask(link.url)
    assert (status, headers.get("Content-Type")) == (200, "video/mp4")
    assert body == content


async def test_a_range_gives_its_part(store: AStore, tmp_path: Path) -> None:
    await store.storage.put(a_file(tmp_path, b"0123456789"), "job-4/x.bin", media_type="")
    link = await store.storage.url("job-4/x.bin", expires_in_s=60)

    assert ask(link.url, Range="bytes=2-5")[::2] == (206, b"2345")
    assert ask(link.url, Range="bytes=-3")[::2] == (206, b"789")
    assert ask(link.url, Range="bytes=50-60")[0] == 416


@pytest.mark.parametrize("change", ["key", "signature", "expiry", "unsigned"])
async def test_a_tampered_link_is_refused(store: AStore, tmp_path: Path, change: str) -> None:
    await store.storage.put(a_file(tmp_path, b"mine"), "job-5/mine.bin", media_type="")
    await store.storage.put(a_file(tmp_path, b"hers"), "job-5/hers.bin", media_type="")
    url = (await store.storage.url("job-5/mine.bin", expires_in_s=60)).url

    changed: dict[str, Any] = {
        "key": url.replace("mine.bin", "hers.bin"),
        "signature": url[:-1] + ("0" if url[-1] != "0" else "1"),
        "expiry": url.replace("X-Amz-Expires=60", "X-Amz-Expires=600").replace("expires=1", "expires=2"),
        "unsigned": urlsplit(url)._replace(query="").geturl(),
    }
    assert changed[change] != url
    assert ask(changed[change])[0] == 403


async def test_an_expired_link_is_refused(store: AStore, tmp_path: Path) -> None:
    await store.storage.put(a_file(tmp_path, b"old"), "job-6/old.bin", media_type="")
    link = await store.expired.url("job-6/old.bin", expires_in_s=1)
    if isinstance(store.expired, S3Storage):
        threading.Event().wait(2.1)  # the server's own clock decides here

    assert ask(link.url)[0] == 403


async def test_a_deleted_file_is_gone_and_deleting_again_is_no_error(store: AStore, tmp_path: Path) -> None:
    await store.storage.put(a_file(tmp_path, b"x"), "job-7/a/x.bin", media_type="")
    link = await store.storage.url("job-7/a/x.bin", expires_in_s=60)

    await store.storage.delete("job-7/a/x.bin")
    await store.storage.delete("job-7/a/x.bin")

    assert ask(link.url)[0] == 404


async def test_s3_links_are_cut_to_seven_days_and_say_so(an_s3_store: AStore) -> None:
    now = SystemClock().now()

    link = await an_s3_store.storage.url("job-8/x.bin", expires_in_s=30 * 24 * 3600)

    assert link.expires_at == pytest.approx(now + WEEK_S, abs=5)
    assert "X-Amz-Expires=604800" in link.url


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/./b", "a\\b", "a\0b"])
async def test_a_key_that_is_no_plain_path_is_refused(store: AStore, key: str) -> None:
    with pytest.raises(ValueError, match="not a storage key"):
        await store.storage.url(key, expires_in_s=60)

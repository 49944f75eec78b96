"""Reading a result late: its links to our own files are signed again, and no others."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from comfyfleet.control.fresh_links import FreshLinks
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.local import LocalStorage
from support.stored_jobs import a_job

pytestmark = pytest.mark.anyio
KEY = "job/a film, 1.mp4"


async def a_result(tmp_path, clock, *, key: str = KEY, lives_s: float = 100.0) -> dict:
    """A result as a worker stores it, with one output and its poster, both signed for `lives_s`."""
    path = tmp_path / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"film")
    path.with_name(path.name + ".poster").write_bytes(b"poster")
    storage = LocalStorage(tmp_path, "http://control:8080", UrlSigner(b"k" * 32, clock), clock)
    signed = await storage.url(key, expires_in_s=lives_s)
    poster = await storage.url(key + ".poster", expires_in_s=lives_s)
    output = {"filename": "f", "url": signed.url, "url_expires_at": signed.expires_at, "poster_url": poster.url}
    return {"id": "job", "output": [output], "ours": {"any": "thing"}}


def read(tmp_path, clock, result: dict, *, finished_at: float) -> dict:
    links = FreshLinks(tmp_path, UrlSigner(b"k" * 32, clock), clock)
    return msgspec.json.decode(
        links.result(a_job(result=msgspec.json.encode(result).decode(), finished_at=finished_at))
    )


def is_open(url: str, clock) -> bool:
    query = parse_qs(urlsplit(url).query)
    return UrlSigner(b"k" * 32, clock).is_valid(f"/files/{KEY}", query["expires"][0], query["signature"][0])


async def test_a_link_that_is_over_is_signed_again_for_as_long_as_it_lived(tmp_path, clock):
    result, finished_at = await a_result(tmp_path, clock, lives_s=100.0), clock.now()
    assert read(tmp_path, clock, result, finished_at=finished_at) == result
    clock.jump(1000)
    assert not is_open(result["output"][0]["url"], clock)

    fresh = read(tmp_path, clock, result, finished_at=finished_at)

    (output,) = fresh["output"]
    assert is_open(output["url"], clock)
    assert output["url"].partition("?")[0] == result["output"][0]["url"].partition("?")[0]
    assert output["url_expires_at"] == pytest.approx(clock.now() + 100, abs=1)
    assert output["poster_url"] != result["output"][0]["poster_url"]
    assert fresh["ours"] == {"any": "thing"}
    clock.jump(101)
    assert not is_open(output["url"], clock)


async def test_no_link_is_made_to_what_is_gone_or_was_never_ours(tmp_path, clock):
    gone, forged, store = [await a_result(tmp_path / name, clock) for name in ("gone", "forged", "store")]
    (tmp_path / "gone" / KEY).unlink()
    forged["output"][0]["url"] = forged["output"][0]["url"].replace("film", "other")
    store["output"][0]["url"] = "https://bucket.example/job/film.mp4?X-Amz-Expires=1"
    finished_at = clock.now()
    clock.jump(1000)

    for name, result in (("gone", gone), ("forged", forged), ("store", store)):
        assert read(tmp_path / name, clock, result, finished_at=finished_at) == result


@pytest.mark.parametrize(
    "text", ['"a string"', '{"output": "none"}', '{"output": [7]}', "{}", '{"output": [{"x": 1}]}']
)
def test_a_foreign_workers_result_of_any_shape_is_passed_on(tmp_path, clock, text):
    assert FreshLinks(tmp_path, UrlSigner(b"k" * 32, clock), clock).result(a_job(result=text)) == msgspec.Raw(
        text.encode()
    )

"""A link opens its one file, in parts where asked, and nothing else: no traversal, no page that runs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyfleet.signing import UrlSigner
from comfyfleet.storage.local import LocalStorage, place
from comfyfleet.storage.serve import files_app
from comfyfleet.testing.clock import FakeClock

pytestmark = pytest.mark.anyio

SIGNER = UrlSigner(b"k" * 32, FakeClock())


async def ask(root: Path, key: str, method: str = "GET", raw: str | None = None, **headers: str) -> httpx.Response:
    """A request with a good signature over `key`, whatever the path is."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(files_app(root, SIGNER)), base_url="http://f") as client:
        path = raw if raw is not None else quote(key)
        query = SIGNER.query("/files/" + key, 60)
        return await client.request(
            method, f"/{path}?{query}", headers={k.replace("_", "-"): v for k, v in headers.items()}
        )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "output"
    (folder / "job").mkdir(parents=True)
    (folder / "job" / "song.mp3").write_bytes(b"0123456789")
    return folder


async def test_head_tells_size_and_type_without_the_bytes(root: Path) -> None:
    answer = await ask(root, "job/song.mp3", "HEAD")

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "10"
    assert answer.headers["content-type"] == "audio/mpeg"
    assert answer.headers["accept-ranges"] == "bytes"


async def test_a_player_can_seek(root: Path) -> None:
    answer = await ask(root, "job/song.mp3", Range="bytes=4-6")

    assert (answer.status_code, answer.content) == (206, b"456")
    assert answer.headers["content-range"] == "bytes 4-6/10"


@pytest.mark.parametrize("text", ["items=0-1", "garbage", "bytes=", "bytes=a-b", "bytes=-", ""])
async def test_what_is_no_range_of_bytes_is_ignored(root: Path, text: str) -> None:
    answer = await ask(root, "job/song.mp3", Range=text)

    assert (answer.status_code, answer.content) == (200, b"0123456789")


async def test_other_methods_are_not_answered(root: Path) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert (await ask(root, "job/song.mp3", method)).status_code == 405
    assert (root / "job" / "song.mp3").exists()


@pytest.mark.parametrize(
    "key",
    ["../secret.txt", "job/../../secret.txt", "/etc/passwd", "job//song.mp3", "job/./song.mp3", "job", "none.mp3", ""],
)
async def test_even_a_signed_path_cannot_leave_the_folder(root: Path, key: str) -> None:
    answer = await ask(root, key, raw=quote(key, safe=""))

    assert answer.status_code in (403, 404)
    assert b"secret" not in answer.content


async def test_a_link_that_leads_out_is_not_followed(root: Path) -> None:
    (root / "job" / "out.txt").symlink_to(root.parent / "secret.txt")

    assert (await ask(root, "job/out.txt")).status_code == 404


@given(key=st.text(max_size=20), signature=st.text(alphabet="0123456789abcdef", max_size=64))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_told_without_a_good_signature(key: str, signature: str) -> None:
    assert not SIGNER.is_valid("/files/" + key, "9999999999", signature)


@pytest.mark.parametrize(
    ("name", "inline"),
    [
        ("a.png", True),
        ("a.mp4", True),
        ("a.mp3", True),
        ("a.html", False),
        ("a.svg", False),
        ("a.js", False),
        ("a.bin", False),
    ],
)
async def test_what_a_browser_could_run_is_a_download(root: Path, name: str, inline: bool) -> None:
    (root / "job" / name).write_text("<script>alert(1)</script>")

    answer = await ask(root, f"job/{name}")

    assert answer.headers["content-disposition"].startswith("inline" if inline else "attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not any(word in answer.headers["content-type"] for word in ("html", "svg", "script"))


async def test_a_strange_name_cannot_break_the_header(root: Path) -> None:
    name = 'a"b; filename=evil\r.mp3'
    (root / "job" / name).write_bytes(b"x")

    answer = await ask(root, f"job/{name}")

    assert answer.status_code == 200
    assert "\r" not in answer.headers["content-disposition"]
    assert "filename=evil" not in answer.headers["content-disposition"]


def test_a_kept_file_is_linked_or_copied_and_the_source_stays(tmp_path: Path) -> None:
    source = tmp_path / "engine.bin"
    source.write_bytes(b"bytes")

    place(source, tmp_path / "kept" / "linked.bin", copy=False)
    place(source, tmp_path / "kept" / "copied.bin", copy=True)
    place(source, tmp_path / "kept" / "linked.bin", copy=False)

    assert (tmp_path / "kept" / "linked.bin").samefile(source)
    assert not (tmp_path / "kept" / "copied.bin").samefile(source)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["copied.bin", "linked.bin"]


async def test_deleting_takes_empty_folders_along_but_not_the_root(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, "http://f", SIGNER, FakeClock())
    (tmp_path / "job" / "a").mkdir(parents=True)
    for key in ("job/a/x", "job/y"):
        (tmp_path / key).write_bytes(b"x")

    await storage.delete("job/a/x")
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["y"]
    await storage.delete("job/y")
    assert list(tmp_path.iterdir()) == []

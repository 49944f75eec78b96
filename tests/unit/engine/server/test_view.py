"""`/view` gives a file whole, drawn anew, or not again to who has it; what cannot be drawn is a 400."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette

from comfyfleet.engine.server import files
from support.engine_world import folders_below

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(tmp_path: Path):
    (tmp_path / "output").mkdir()
    Image.new("RGBA", (10, 12), (10, 20, 30, 90)).save(tmp_path / "output" / "red.png")
    (tmp_path / "output" / "notes.txt").write_text("no picture")
    app = Starlette(routes=files.ROUTES)
    app.state.engine = SimpleNamespace(folders=folders_below(tmp_path))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as opened:
        yield opened


def drawn(answer: httpx.Response) -> tuple[str | None, str, object]:
    with Image.open(io.BytesIO(answer.content)) as picture:
        return picture.format, picture.mode, picture.getpixel((2, 2))


@pytest.mark.parametrize("preview", ["webp", "", "png", "webp;x", ";90"])
async def test_a_preview_of_any_other_form_is_webp(client: httpx.AsyncClient, preview: str) -> None:
    answer = await client.get("/view", params={"filename": "red.png", "preview": preview})

    assert answer.headers["content-type"] == "image/webp"
    assert drawn(answer)[:2] == ("WEBP", "RGBA")


@pytest.mark.parametrize(
    ("name", "preview"), [("red.png", "webp;200"), ("red.png", "jpeg;99999999999999999999"), ("notes.txt", "webp")]
)
async def test_what_cannot_be_drawn_is_refused(client: httpx.AsyncClient, name: str, preview: str) -> None:
    answer = await client.get("/view", params={"filename": name, "preview": preview})

    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request"


async def test_a_channel_is_rgb_or_a_and_any_other_word_means_the_file(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    answers = {
        channel: await client.get("/view", params={"filename": "red.png", "channel": channel})
        for channel in ("rgb", "a", "rgba", "x")
    }

    assert drawn(answers["rgb"]) == ("PNG", "RGB", (10, 20, 30))
    assert drawn(answers["a"]) == ("PNG", "RGBA", (0, 0, 0, 90))
    assert answers["rgba"].content == answers["x"].content == (tmp_path / "output" / "red.png").read_bytes()


async def test_who_has_the_file_is_not_sent_it_again(client: httpx.AsyncClient) -> None:
    whole = await client.get("/view?filename=red.png")
    tag, date = whole.headers["etag"], whole.headers["last-modified"]

    for asked, status in [
        ({"If-None-Match": tag}, 304),
        ({"If-None-Match": f'"other", W/{tag}'}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": '"other"', "If-Modified-Since": date}, 200),
        ({"If-Modified-Since": date}, 304),
        ({"If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}, 200),
    ]:
        answer = await client.get("/view?filename=red.png", headers=asked)
        assert (answer.status_code, answer.content) == (status, b"" if status == 304 else whole.content), asked

"""Files in and out of an engine, and what it says of itself: asked of every engine we ship."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import pytest

from support.engine_process import Talk, picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


# Files


async def test_view_gives_ranges_previews_channels_and_refuses_to_leave_its_folder(client: Talk) -> None:
    await client.run(picture(0x123456, "view"))
    url = f"{client.engine.url}/view?filename=view_00001_.png"

    async with client.http.get(url) as whole:
        content = await whole.read()
        assert (whole.status, whole.content_type) == (200, "image/png")
        assert whole.headers["Content-Disposition"] == 'filename="view_00001_.png"'
        assert whole.headers["ETag"]
    async with client.http.get(url, headers={"Range": "bytes=0-15"}) as part:
        assert (part.status, await part.read()) == (206, content[:16])
        assert part.headers["Content-Range"] == f"bytes 0-15/{len(content)}"
    async with client.http.get(url, headers={"Range": "bytes=999999-"}) as beyond:
        assert beyond.status == 416
    async with client.http.head(url) as head:
        assert (head.status, head.headers["Content-Length"]) == (200, str(len(content)))
    async with client.http.get(url + "&preview=webp;50") as preview:
        assert (preview.content_type, (await preview.read())[8:12]) == ("image/webp", b"WEBP")
    async with client.http.get(url + "&channel=a") as alpha:
        assert (await alpha.read()).startswith(b"\x89PNG")
    for query, status in {
        "filename=../../etc/passwd": 400,
        "filename=/etc/passwd": 400,
        "filename=view_00001_.png&type=models": 400,
        "filename=view_00001_.png&subfolder=../../..": 403,
        "filename=missing.png": 404,
    }.items():
        async with client.http.get(f"{client.engine.url}/view?{query}") as refused:
            assert refused.status == status, query


async def upload(client: Talk, content: bytes, **fields: str) -> tuple[int, dict | str]:
    form = aiohttp.FormData()
    form.add_field("image", content, filename=fields.pop("name", "red.png"))
    for name, value in fields.items():
        form.add_field(name, value)
    return await client.post("/upload/image", data=form)


async def test_an_upload_keeps_its_name_unless_another_file_has_it(client: Talk) -> None:
    assert await upload(client, b"one") == (200, {"name": "red.png", "subfolder": "", "type": "input"})
    assert (await upload(client, b"one"))[1]["name"] == "red.png"
    assert (await upload(client, b"two"))[1]["name"] == "red (1).png"
    assert (await upload(client, b"three", overwrite="true"))[1]["name"] == "red.png"
    assert (client.engine.input / "red.png").read_bytes() == b"three"
    assert (await upload(client, b"x", subfolder="a/b", type="temp"))[1] == {
        "name": "red.png",
        "subfolder": "a/b",
        "type": "temp",
    }
    assert (await upload(client, b"x", subfolder="../../x"))[0] == 400


async def test_an_uploaded_picture_can_be_loaded_from_its_folder(client: Talk) -> None:
    made = await client.run(picture(0xFF0000, "again"))
    content = (client.engine.output / made["outputs"]["2"]["images"][0]["filename"]).read_bytes()
    _, stored = await upload(client, content, name="mine.png", subfolder="here")

    entry = await client.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": f"{stored['subfolder']}/{stored['name']}"}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )

    (shown,) = entry["outputs"]["2"]["images"]
    assert shown["type"] == "temp"
    assert shown["filename"].startswith("ComfyUI_temp_")


# What it says of itself


async def test_it_describes_itself(client: Talk) -> None:
    _, stats = await client.get("/system_stats")
    assert {"os", "ram_total", "ram_free", "comfyui_version", "python_version", "pytorch_version", "argv"} <= set(
        stats["system"]
    )
    assert {"name", "type", "index", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"} <= set(
        stats["devices"][0]
    )
    assert (await client.get("/features"))[1] == {"supports_preview_metadata": True, "max_upload_size": 104857600}
    assert "checkpoints" in (await client.get("/models"))[1]
    assert (await client.get("/embeddings"))[1] == []
    assert (await client.get("/api/prompt"))[1] == {"exec_info": {"queue_remaining": 0}}
    assert (await client.get("/object_info/Nope"))[1] == {}
    _, described = await client.get("/object_info/EmptyImage")
    assert described["EmptyImage"]["input"]["required"]["width"] == [
        "INT",
        {"default": 512, "min": 1, "max": 16384, "step": 1},
    ]
    assert described["EmptyImage"]["input_order"] == {"required": ["width", "height", "batch_size", "color"]}
    assert described["EmptyImage"]["output"] == ["IMAGE"]


async def test_a_foreign_page_cannot_drive_it(client: Talk, colors: Iterator[int]) -> None:
    evil = {"Origin": "http://evil.example"}

    async with client.http.post(f"{client.engine.url}/prompt", json={}, headers=evil) as refused:
        assert refused.status == 403
    with pytest.raises(aiohttp.WSServerHandshakeError) as no_socket:
        await client.http.ws_connect(f"{client.engine.url}/ws?clientId=evil", headers=evil)
    assert no_socket.value.status == 403
    same = {"Origin": client.engine.url}
    async with client.http.post(
        f"{client.engine.url}/prompt", json={"prompt": picture(next(colors))}, headers=same
    ) as accepted:
        assert accepted.status == 200


async def test_many_prompts_at_once_all_end(client: Talk, colors: Iterator[int]) -> None:
    answers = await asyncio.gather(*(client.submit(picture(next(colors), "many")) for _ in range(20)))

    entries = [await client.entry(answer["prompt_id"]) for _, answer in answers]

    names = [entry["outputs"]["2"]["images"][0]["filename"] for entry in entries]
    assert len(set(names)) == 20

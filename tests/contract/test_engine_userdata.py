"""What an editor keeps on the engine: ComfyUI's answers, and no way out of the user's folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from comfyfleet.engine.server import inside, userdata
from support.engine_world import folders_below

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    routes = [*userdata.ROUTES, *inside.ROUTES]
    app = Starlette(routes=[*routes, Mount("/api", routes=routes)])
    app.state.engine = SimpleNamespace(folders=folders_below(tmp_path))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as opened:
        yield opened


def told(answer: httpx.Response) -> tuple:
    return answer.status_code, answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


async def test_a_file_is_kept_listed_moved_and_removed_as_in_comfyui(client: httpx.AsyncClient) -> None:
    assert told(await client.get("/users")) == (200, {"storage": "server", "migrated": False})
    assert told(await client.get("/userdata?dir=workflows")) == (404, "Directory not found")
    assert told(await client.get("/v2/userdata")) == (200, [])

    kept = await client.post("/userdata/workflows%2Fa.json?overwrite=false", content=b'{"x":1}')
    again = await client.post("/userdata/workflows%2Fa.json?overwrite=false", content=b"other")
    read = await client.get("/api/userdata/workflows%2Fa.json")

    assert told(kept) == (200, "workflows/a.json")
    assert told(again) == (409, "File already exists")
    assert (read.status_code, read.content) == (200, b'{"x":1}')
    (facts,) = (await client.get("/userdata?dir=workflows&full_info=true")).json()
    assert (set(facts), facts["path"], facts["size"]) == ({"path", "size", "modified", "created"}, "a.json", 7)
    assert told(await client.get("/userdata?dir=.&recurse=true&split=true")) == (
        200,
        [["workflows/a.json", "workflows", "a.json"]],
    )
    tree = (await client.get("/v2/userdata")).json()
    assert [(entry["name"], entry["type"]) for entry in tree] == [("workflows", "directory"), ("a.json", "file")]
    assert told(await client.post("/userdata/workflows%2Fa.json/move/workflows%2Fb.json")) == (200, "workflows/b.json")
    assert (await client.post("/userdata/none/move/x")).status_code == 404
    assert (await client.delete("/userdata/workflows%2Fb.json")).status_code == 204
    assert (await client.delete("/userdata/workflows%2Fb.json")).status_code == 404
    assert told(await client.get("/users")) == (200, {"storage": "server", "migrated": True})


@pytest.mark.parametrize(
    "name", ["..%2F..%2Fx", "%2Fetc%2Fpasswd", "..", "a%2F..%2F..%2Fx", "%252e%252e%2Fx", "out%2Fx"]
)
async def test_no_name_leads_out_of_the_users_folder(client: httpx.AsyncClient, tmp_path: Path, name: str) -> None:
    home = tmp_path / "user" / "default"
    home.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (home / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x").write_text("secret")
    before = sorted(tmp_path.rglob("*"))

    answers = [
        await client.get(f"/userdata/{name}"),
        await client.post(f"/userdata/{name}", content=b"x"),
        await client.post(f"/userdata/{name}/move/a"),
        await client.delete(f"/userdata/{name}"),
    ]

    assert all(answer.status_code in (403, 404, 405) for answer in answers), [answer.status_code for answer in answers]
    assert sorted(tmp_path.rglob("*")) == before


async def test_settings_are_kept_whole_or_one_by_one(client: httpx.AsyncClient, tmp_path: Path) -> None:
    assert told(await client.get("/settings")) == (200, {})

    await client.post("/settings", json={"a": 1, "b": {"c": 2}})
    await client.post("/settings/a", json=[3])
    refused = await client.post("/settings", json=[1])

    assert told(await client.get("/settings")) == (200, {"a": [3], "b": {"c": 2}})
    assert told(await client.get("/settings/b")) == (200, {"c": 2})
    assert told(await client.get("/settings/none")) == (200, None)
    assert refused.status_code == 400
    (tmp_path / "user" / "default" / "comfy.settings.json").write_text("{broken")
    assert told(await client.get("/settings")) == (200, {})


async def test_an_editor_finds_every_route_it_asks_at_its_start(client: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "models" / "vae" / "sub").mkdir(parents=True)
    (tmp_path / "models" / "vae" / "sub" / "x.safetensors").write_bytes(b"12345")
    (tmp_path / "output" / "a.png").write_bytes(b"1")

    assert told(await client.get("/i18n")) == told(await client.get("/workflow_templates")) == (200, {})
    assert told(await client.get("/internal/logs")) == (200, "")
    assert (await client.get("/internal/logs/raw")).json()["entries"] == []
    assert (await client.patch("/internal/logs/subscribe", json={"clientId": "a", "enabled": True})).status_code == 200
    assert (await client.get("/internal/folder_paths")).json()["vae"][0] == str(tmp_path / "models" / "vae")
    assert told(await client.get("/internal/files/output")) == (200, ["a.png"])
    assert told(await client.get("/internal/files/models")) == (400, {"error": "Invalid directory type"})
    folders = {entry["name"]: entry["folders"] for entry in (await client.get("/experiment/models")).json()}
    assert folders["vae"][0] == str(tmp_path / "models" / "vae")
    assert "configs" not in folders
    (model,) = (await client.get("/experiment/models/vae")).json()
    assert (model["name"], model["pathIndex"], model["size"]) == ("sub/x.safetensors", 0, 5)
    assert (await client.get("/experiment/models/nothing")).status_code == 404

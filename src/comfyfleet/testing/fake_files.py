"""The fake engine's files and what it says of itself: `/view`, `/upload/image`, `/system_stats` and their like."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from comfyfleet.testing.fake_nodes import NODES, object_info

MAX_UPLOAD_BYTES = 100 * 2**20
FEATURES = {"supports_preview_metadata": True, "max_upload_size": MAX_UPLOAD_BYTES}
_encode = msgspec.json.Encoder().encode


class FakeFiles:
    """Routes over the engine's three folders."""

    def __init__(self, folders: Mapping[str, Path], *, argv: list[str] | None = None) -> None:
        self._folders = folders
        self._argv = sys.argv if argv is None else argv

    def add_routes(self, app: web.Application, prefix: str) -> None:
        app.router.add_get(f"{prefix}/view", self._view)
        app.router.add_post(f"{prefix}/upload/image", self._upload)
        app.router.add_get(f"{prefix}/object_info", self._all_object_info)
        app.router.add_get(f"{prefix}/object_info/{{name}}", self._object_info)
        app.router.add_get(f"{prefix}/system_stats", self._system_stats)
        app.router.add_get(f"{prefix}/features", self._features)
        app.router.add_get(f"{prefix}/models", self._models)
        app.router.add_get(f"{prefix}/embeddings", self._embeddings)

    async def _view(self, request: web.Request) -> web.StreamResponse:
        folder = self._folders.get(request.query.get("type", "output"))
        name = request.query.get("filename", "")
        if folder is None or ".." in name or name.startswith("/"):
            return web.Response(status=400)
        path = folder / request.query.get("subfolder", "") / name
        if folder.resolve() not in path.resolve().parents:
            return web.Response(status=403)
        if not path.is_file():
            return web.Response(status=404)
        if "preview" in request.query or request.query.get("channel", "rgba") != "rgba":
            return _recoded(path, request.query)
        return web.FileResponse(path, headers={"Content-Disposition": f'filename="{name}"'})

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        field, kind = form.get("image"), str(form.get("type", "input"))
        if not isinstance(field, web.FileField) or kind not in self._folders:
            return web.Response(status=400)
        root, subfolder = self._folders[kind], str(form.get("subfolder", ""))
        path = root / subfolder / Path(field.filename).name
        if root.resolve() not in path.resolve().parents:
            return web.Response(status=400)
        content = field.file.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        stem, counter = path.stem, 1
        while form.get("overwrite") not in ("true", "1") and path.exists() and path.read_bytes() != content:
            path = path.with_name(f"{stem} ({counter}){path.suffix}")
            counter += 1
        path.write_bytes(content)
        return as_json({"name": path.name, "subfolder": subfolder, "type": kind})

    async def _all_object_info(self, _request: web.Request) -> web.Response:
        return as_json({name: object_info(name) for name in NODES})

    async def _object_info(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return as_json({name: object_info(name)} if name in NODES else {})

    async def _system_stats(self, _request: web.Request) -> web.Response:
        memory = 24 * 2**30
        system = {
            "os": "posix",
            "ram_total": memory,
            "ram_free": memory,
            "comfyui_version": "0.3.64",
            "python_version": sys.version,
            "pytorch_version": "none",
            "argv": self._argv,
        }
        sizes = dict.fromkeys(("vram_total", "vram_free", "torch_vram_total", "torch_vram_free"), memory)
        return as_json({"system": system, "devices": [{"name": "cpu", "type": "cpu", "index": 0, **sizes}]})

    async def _features(self, _request: web.Request) -> web.Response:
        return as_json(FEATURES)

    async def _models(self, _request: web.Request) -> web.Response:
        return as_json(["checkpoints", "vae", "loras"])

    async def _embeddings(self, _request: web.Request) -> web.Response:
        return as_json([])


def as_json(body: Any, status: int = 200) -> web.Response:
    return web.Response(body=_encode(body), status=status, content_type="application/json")


def _recoded(path: Path, query: Mapping[str, str]) -> web.Response:
    from PIL import Image  # heavy, and only a few tests look at previews

    with Image.open(path) as opened:
        picture = opened.convert("RGBA" if query.get("channel") == "a" else "RGB")
    if query.get("channel") == "a":
        picture = picture.getchannel("A")
    kind = query.get("preview", "png").partition(";")[0]
    buffer = io.BytesIO()
    picture.save(buffer, format={"jpeg": "JPEG", "webp": "WEBP"}.get(kind, "PNG"))
    return web.Response(body=buffer.getvalue(), content_type=f"image/{kind}")

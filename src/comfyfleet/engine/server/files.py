"""The routes about files: `/view` with ranges, previews and channels; `/upload/image` and `/upload/mask`; metadata."""

from __future__ import annotations

import io
import json
import mimetypes
import os
from pathlib import Path
from typing import Any

import anyio.to_thread
from PIL import Image
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.staticfiles import NotModifiedResponse

from comfyfleet.engine.folders import MODEL_FOLDERS, FolderPaths, read_metadata
from comfyfleet.engine.server.answers import MAX_BODY_BYTES, TooLarge, bad_request, empty, json_answer
from comfyfleet.engine.server.engine import Engine

KINDS = ("input", "output", "temp")
# A browser must not run what an engine wrote or a stranger uploaded.
ACTIVE_TYPES = {"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"}
PREVIEW_FORMATS = {"webp": "WEBP", "jpeg": "JPEG"}
DEFAULT_PREVIEW_QUALITY, MAX_QUALITY = 90, 100


class OutsideFolder(Exception):
    """A name that leads out of its folder."""


def _place(paths: FolderPaths, kind: str, subfolder: str) -> Path:
    root = paths.root(kind).resolve()
    folder = (root / subfolder).resolve()
    if not folder.is_relative_to(root):
        raise OutsideFolder
    return folder


async def get_view(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    query = request.query_params
    name, kind = query.get("filename", ""), query.get("type", "output")
    for known in KINDS:
        if name.endswith(f"[{known}]"):
            kind, name = known, name[: -len(known) - 2].rstrip()
    if not name or name.startswith("/") or ".." in name or "\0" in name or kind not in KINDS:
        return empty(400)
    try:
        folder = _place(engine.folders.paths, kind, query.get("subfolder", ""))
    except (OutsideFolder, ValueError):
        return empty(403)
    path = folder / os.path.basename(name)
    if not path.is_file():
        return empty(404)
    disposition = f'filename="{path.name}"'
    preview, channel = query.get("preview"), query.get("channel", "")
    if preview is not None or channel in ("rgb", "a"):
        try:
            body, media_type = await anyio.to_thread.run_sync(_redrawn, path, preview, channel)
        except (OSError, ValueError) as error:
            return bad_request("This file cannot be drawn as a picture.", f"{type(error).__name__}: {error}")
        return Response(body, media_type=media_type, headers={"Content-Disposition": disposition})
    media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if media_type in ACTIVE_TYPES:
        media_type = "application/octet-stream"
    whole = FileResponse(
        path, media_type=media_type, headers={"Content-Disposition": disposition}, stat_result=path.stat()
    )
    return NotModifiedResponse(whole.headers) if _is_held(request.headers, whole.headers) else whole


def _is_held(asked: Headers, told: Headers) -> bool:
    """True when the asker has this very file: by its entity tag, or, giving none, by its date (RFC 9110, 13.1)."""
    tags = asked.get("if-none-match")
    if tags is not None:
        return any(tag.strip().removeprefix("W/") in (told["etag"], "*") for tag in tags.split(","))
    return asked.get("if-modified-since") == told["last-modified"]


def _redrawn(path: Path, preview: str | None, channel: str) -> tuple[bytes, str]:
    """The picture as a preview ("webp;75", "jpeg"), or one of its parts as PNG.

    Raises OSError for other files, ValueError for a quality over 100.
    """
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        if preview is not None:
            form, _, quality = preview.partition(";")
            if form not in PREVIEW_FORMATS or ("a" in picture.getbands() and channel == "rgb"):
                form = "webp"
            drawn = picture.convert("RGB") if form == "jpeg" or channel == "rgb" else picture.copy()
            level = int(quality) if quality.isdigit() else DEFAULT_PREVIEW_QUALITY
            if level > MAX_QUALITY:
                raise ValueError(f"a quality is at most {MAX_QUALITY}, not {level}")
            drawn.save(buffer, format=PREVIEW_FORMATS[form], quality=level)
            return buffer.getvalue(), f"image/{form}"
        if channel == "rgb":
            picture.convert("RGB").save(buffer, format="PNG")
        else:
            alpha = picture.convert("RGBA").getchannel("A")
            shade = Image.new("RGBA", picture.size)
            shade.putalpha(alpha)
            shade.save(buffer, format="PNG")
    return buffer.getvalue(), "image/png"


async def post_upload_image(request: Request) -> Response:
    return await _upload(request, is_mask=False)


async def post_upload_mask(request: Request) -> Response:
    return await _upload(request, is_mask=True)


async def _upload(request: Request, *, is_mask: bool) -> Response:
    engine: Engine = request.app.state.engine
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise TooLarge
    try:
        async with request.form(max_part_size=MAX_BODY_BYTES) as form:
            upload = form.get("image")
            if not isinstance(upload, UploadFile) or not upload.filename:
                return empty(400)
            content = await upload.read()
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            name = upload.filename
    except MultiPartException as error:
        return bad_request("The body is not a form.", error.message)
    kind = fields.get("type", "input") or "input"
    if kind not in KINDS:
        return bad_request(f"type must be one of {', '.join(KINDS)}.", "type")
    try:
        folder, folder_name = _upload_place(engine.folders.paths, kind, fields.get("subfolder", ""))
    except (OutsideFolder, ValueError):
        return empty(400)
    name = os.path.basename(name)
    if not name or name in (".", ".."):
        return empty(400)
    if is_mask:
        original = _original(engine, fields.get("original_ref", ""))
        if original is None:
            return bad_request("original_ref must name an existing picture.", "original_ref")
        content = await anyio.to_thread.run_sync(_with_mask, original, content)
    overwrite = fields.get("overwrite", "") in ("true", "1")
    name = await anyio.to_thread.run_sync(_store, folder, name, content, overwrite)
    return json_answer({"name": name, "subfolder": folder_name, "type": kind})


def _upload_place(paths: FolderPaths, kind: str, subfolder: str) -> tuple[Path, str]:
    """(folder, its name below the root). Raises OutsideFolder."""
    folder = _place(paths, kind, os.path.normpath(subfolder or "."))
    name = os.path.relpath(folder, paths.root(kind).resolve())
    return folder, "" if name == "." else name


def _store(folder: Path, name: str, content: bytes, overwrite: bool) -> str:
    """Write under the name, or under the first `name (n)` that is free or holds the same; the name used."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, extension = os.path.splitext(name)
    number = 0
    while not overwrite and (folder / name).exists():
        if (folder / name).read_bytes() == content:
            return name
        number += 1
        name = f"{stem} ({number}){extension}"
    staging = folder / f".{os.getpid()}-{name}.part"
    staging.write_bytes(content)
    staging.replace(folder / name)
    return name


def _original(engine: Engine, reference: str) -> Path | None:
    try:
        given: Any = json.loads(reference)
        name, kind = str(given["filename"]), str(given.get("type", "output"))
        folder = _place(engine.folders.paths, kind, str(given.get("subfolder", "")))
    except (ValueError, KeyError, TypeError, AttributeError, OutsideFolder):
        return None
    path = folder / os.path.basename(name)
    return path if path.is_file() else None


def _with_mask(original: Path, mask: bytes) -> bytes:
    """The original with the mask's transparency, as PNG with the original's texts."""
    buffer = io.BytesIO()
    with Image.open(original) as picture, Image.open(io.BytesIO(mask)) as drawn:
        masked = picture.convert("RGBA")
        alpha = drawn.convert("RGBA").getchannel("A")
        masked.putalpha(alpha.resize(masked.size) if alpha.size != masked.size else alpha)
        masked.save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


async def get_view_metadata(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    folder, name = request.path_params["folder"], request.query_params.get("filename", "")
    if folder not in MODEL_FOLDERS or not name.endswith(".safetensors"):
        return empty(404)
    try:
        path = engine.folders.model_path(folder, name)
    except FileNotFoundError:
        return empty(404)
    found = read_metadata(Path(path))
    return json_answer(found) if found else empty(404)


ROUTES: list[BaseRoute] = [
    Route("/view", get_view),
    Route("/upload/image", post_upload_image, methods=["POST"]),
    Route("/upload/mask", post_upload_mask, methods=["POST"]),
    Route("/view_metadata/{folder}", get_view_metadata),
]

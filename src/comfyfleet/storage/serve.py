"""Answer signed links to local files: GET and HEAD, Range, and nothing outside the root. Mounted at `/files`.

A link is its own permission: no key is asked for, and a wrong or expired signature is 403 whether or not the file
exists. What a browser could run (HTML, SVG, scripts) comes as a download, never as a page of this origin.
"""

from __future__ import annotations

import mimetypes
import re
from pathlib import Path

import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from comfyfleet.signing import UrlSigner
from comfyfleet.storage.base import checked_key
from comfyfleet.storage.local import URL_PREFIX
from comfyfleet.web import control_error
from comfyfleet.wire.errors import FleetError, Forbidden, NotFound

_RANGES = re.compile(r"(?i:bytes)=\s*(\d+-\d*|-\d+)(\s*,\s*(\d+-\d*|-\d+))*\s*")
_SHOWN = ("image/", "audio/", "video/")
_NEVER_SHOWN = frozenset({"image/svg+xml"})


def files_app(root: Path, signer: UrlSigner) -> Starlette:
    """An app whose every path is a key under `root`."""

    async def read(request: Request) -> Response:
        try:
            return await _open(root, signer, request)
        except FleetError as error:
            return control_error(error)

    return Starlette(routes=[Route("/{key:path}", read, methods=["GET"])])


async def _open(root: Path, signer: UrlSigner, request: Request) -> Response:
    key = request.path_params["key"]
    query = request.query_params
    if not signer.is_valid(URL_PREFIX + key, query.get("expires", ""), query.get("signature", "")):
        raise Forbidden("this link is not valid, or not any more")
    try:
        path = await anyio.to_thread.run_sync(_find, root, checked_key(key))
    except (ValueError, OSError) as problem:
        raise NotFound("there is no such file") from problem
    if not _RANGES.fullmatch(request.headers.get("range", "")):
        # What is no range of bytes is to be ignored (RFC 9110, 14.2).
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    shown = media_type.startswith(_SHOWN) and media_type not in _NEVER_SHOWN
    return FileResponse(
        path,
        media_type=media_type if shown else _inert(media_type),
        filename=path.name,
        content_disposition_type="inline" if shown else "attachment",
        headers={
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox; default-src 'none'",
            "Cache-Control": "private, max-age=3600",
        },
    )


def _find(root: Path, key: str) -> Path:
    """The file, following links only within the root. Raises FileNotFoundError."""
    path = (root / key).resolve(strict=True)
    if not path.is_relative_to(root.resolve()) or not path.is_file():
        raise FileNotFoundError(key)
    return path


def _inert(media_type: str) -> str:
    """The type itself, unless a browser would run it."""
    runs = ("html", "xml", "script", "css")
    return "application/octet-stream" if any(word in media_type for word in runs) else media_type

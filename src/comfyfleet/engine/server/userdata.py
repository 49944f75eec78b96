"""What an editor keeps on a server: files of its user, and settings. ComfyUI's routes, for its one user "default".

Names come from clients, so each is resolved and must stay below the user's folder. A file gets its name only when it is
complete. Not here: several users.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from comfyfleet.engine.server.answers import bad_request, empty, json_answer, read_body, read_json
from comfyfleet.engine.server.engine import Engine

USER = "default"
SETTINGS = "comfy.settings.json"  # the name that an editor may also ask for as a file


def _home(request: Request) -> Path:
    engine: Engine = request.app.state.engine
    return engine.folders.paths.user / USER


def _place(home: Path, name: str) -> Path | None:
    """The path of a client's name; None when it leads out of the folder, by dots or by a link."""
    if "\0" in name:
        return None
    path = Path(os.path.normpath(home / name))
    if path == home or not path.is_relative_to(home) or not path.resolve().is_relative_to(home.resolve()):
        return None
    return path


def _names(request: Request) -> list[str]:
    """The names in the path, slashes inside them encoded: `/userdata/<file>` or `/userdata/<file>/move/<to>`."""
    encoded = bytes(request.scope["raw_path"]).decode("latin-1").partition("/userdata/")[2]
    return [unquote(unquote(part)) for part in encoded.split("/")]


def _is_true(request: Request, name: str, *, default: str = "") -> bool:
    return request.query_params.get(name, default).lower() == "true"


def _facts(path: Path, home: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": path.relative_to(home).as_posix(),
        "size": status.st_size,
        "modified": status.st_mtime,
        "created": status.st_ctime,
    }


async def get_users(request: Request) -> Response:
    return json_answer({"storage": "server", "migrated": _home(request).exists()})


async def get_listing(request: Request) -> Response:
    """Files of one folder: names, parts of names, or facts."""
    home, given = _home(request), request.query_params.get("dir", "")
    if not given:
        return PlainTextResponse("Directory not provided", 400)
    folder = home if os.path.normpath(given) == "." else _place(home, given)
    if folder is None:
        return PlainTextResponse("Invalid directory", 403)
    if not folder.is_dir():
        return PlainTextResponse("Directory not found", 404)
    pattern = "**/*" if _is_true(request, "recurse") else "*"
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
    if _is_true(request, "full_info"):
        return json_answer([_facts(path, folder) for path in found])
    names = [path.relative_to(folder).as_posix() for path in found]
    return json_answer([[name, *name.split("/")] for name in names] if _is_true(request, "split") else names)


async def get_tree(request: Request) -> Response:
    """Everything below a folder: folders first, then files, each by name."""
    home, given = _home(request), unquote(request.query_params.get("path", ""))
    folder = _place(home, given) if given else home
    if folder is None:
        return PlainTextResponse("This path leads out of the user's folder", 400)
    if not folder.exists():
        return PlainTextResponse("There is nothing at this path", 404) if given else json_answer([])
    if not folder.is_dir():
        return PlainTextResponse("This path is no folder", 400)
    entries: list[dict[str, Any]] = []
    for path in folder.rglob("*"):
        entry: dict[str, Any] = {"name": path.name, "path": path.relative_to(home).as_posix(), "type": "directory"}
        if path.is_file():
            status = path.stat()
            entry |= {"type": "file", "size": status.st_size, "modified": status.st_mtime}
        entries.append(entry)
    return json_answer(sorted(entries, key=lambda entry: (entry["type"] != "directory", entry["name"].lower())))


async def get_file(request: Request) -> Response:
    path = _place(_home(request), "/".join(_names(request)))
    if path is None:
        return empty(403)
    return FileResponse(path) if path.is_file() else empty(404)


async def post_file(request: Request) -> Response:
    """Store the body under the name, or move what is there."""
    home, names = _home(request), _names(request)
    is_move = len(names) == 3 and names[1] == "move"
    source = _place(home, names[0] if is_move else "/".join(names))
    target = _place(home, names[2]) if is_move else source
    if source is None or target is None:
        return empty(403)
    if is_move and not source.is_file():
        return empty(404)
    if target.exists() and request.query_params.get("overwrite", "true") == "false":
        return PlainTextResponse("File already exists", 409)
    content = None if is_move else await read_body(request)
    try:
        await anyio.to_thread.run_sync(_put, target, content, source)
    except OSError as error:
        return bad_request("This name cannot be used for a file.", str(error.strerror))
    return json_answer(_facts(target, home) if _is_true(request, "full_info") else target.relative_to(home).as_posix())


def _put(target: Path, content: bytes | None, source: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        source = target.with_name(f".{os.getpid()}-{target.name}.part")
        source.write_bytes(content)
    os.replace(source, target)


async def delete_file(request: Request) -> Response:
    path = _place(_home(request), "/".join(_names(request)))
    if path is None:
        return empty(403)
    if not path.is_file():
        return empty(404)
    path.unlink()
    return empty(204)


def _read_settings(home: Path) -> dict[str, Any]:
    """What is kept; {} when there is nothing that can be read."""
    try:
        given = msgspec.json.decode((home / SETTINGS).read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    return given if isinstance(given, dict) else {}


async def get_settings(request: Request) -> Response:
    settings = _read_settings(_home(request))
    return json_answer(settings.get(request.path_params["id"]) if "id" in request.path_params else settings)


async def post_settings(request: Request) -> Response:
    """Change some settings, or the one named in the path."""
    home, given = _home(request), await read_json(request)
    changes = {request.path_params["id"]: given} if "id" in request.path_params else given
    if not isinstance(changes, dict):
        return bad_request("Settings are an object: names and values.")
    path = home / SETTINGS
    await anyio.to_thread.run_sync(_put, path, msgspec.json.encode(_read_settings(home) | changes), path)
    return empty()


ROUTES: list[BaseRoute] = [
    Route("/users", get_users),
    Route("/userdata", get_listing),
    Route("/v2/userdata", get_tree),
    Route("/userdata/{rest:path}", get_file),
    Route("/userdata/{rest:path}", post_file, methods=["POST"]),
    Route("/userdata/{rest:path}", delete_file, methods=["DELETE"]),
    Route("/settings", get_settings),
    Route("/settings", post_settings, methods=["POST"]),
    Route("/settings/{id}", get_settings),
    Route("/settings/{id}", post_settings, methods=["POST"]),
]

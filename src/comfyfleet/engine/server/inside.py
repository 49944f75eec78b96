"""Routes that ComfyUI's editor asks at its start: nothing that this engine has none of is made up, each is empty.

`/internal/…` is no public contract in ComfyUI either. Its logs stay empty here: they would show every prompt to whoever
asks; this engine writes its own to stderr.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from comfyfleet.engine.folders import MODEL_FOLDERS
from comfyfleet.engine.server.answers import empty, json_answer
from comfyfleet.engine.server.engine import Engine

KINDS = ("output", "input", "temp")
NOT_FOR_MODELS = ("configs", "custom_nodes")


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def get_nothing(request: Request) -> Response:
    return json_answer({})


async def get_no_logs(request: Request) -> Response:
    return json_answer("")


async def get_no_raw_logs(request: Request) -> Response:
    return json_answer({"entries": [], "size": {"cols": 80, "rows": 24}})


async def subscribe(request: Request) -> Response:
    """Accepted; nothing will come."""
    return empty()


async def get_folder_paths(request: Request) -> Response:
    folders = _engine(request).folders
    return json_answer({kind: [str(path) for path in folders.model_roots(kind)] for kind in MODEL_FOLDERS})


async def get_files(request: Request) -> Response:
    """Names in one of the folders, the newest first."""
    kind = request.path_params["kind"]
    if kind not in KINDS:
        return json_answer({"error": "Invalid directory type"}, 400)
    with os.scandir(_engine(request).folders.paths.root(kind)) as entries:
        files = sorted((entry for entry in entries if entry.is_file()), key=lambda entry: -entry.stat().st_mtime)
    return json_answer([entry.name for entry in files])


async def get_model_folders(request: Request) -> Response:
    folders = _engine(request).folders
    return json_answer(
        [
            {"name": kind, "folders": [str(path) for path in folders.model_roots(kind)]}
            for kind in MODEL_FOLDERS
            if kind not in NOT_FOR_MODELS
        ]
    )


async def get_models(request: Request) -> Response:
    """Files of one kind, with the place of their folder in the list of folders."""
    folders, kind = _engine(request).folders, request.path_params["folder"]
    if kind not in MODEL_FOLDERS:
        return empty(404)
    roots = folders.model_roots(kind)
    found: list[dict[str, Any]] = []
    for name in folders.model_names(kind):
        path = Path(folders.model_path(kind, name))
        status = path.stat()
        index = next(index for index, root in enumerate(roots) if path.is_relative_to(root))
        times = {"modified": status.st_mtime, "created": status.st_ctime}
        found.append({"name": name, "pathIndex": index, **times, "size": status.st_size})
    return json_answer(found)


ROUTES: list[BaseRoute] = [
    Route("/i18n", get_nothing),
    Route("/workflow_templates", get_nothing),
    Route("/experiment/models", get_model_folders),
    Route("/experiment/models/{folder}", get_models),
    Route("/internal/logs", get_no_logs),
    Route("/internal/logs/raw", get_no_raw_logs),
    Route("/internal/logs/subscribe", subscribe, methods=["PATCH"]),
    Route("/internal/folder_paths", get_folder_paths),
    Route("/internal/files/{kind}", get_files),
]

"""The routes about prompts and the engine itself: submit, queue, history, interrupt, free, describe.

Each is parse, call, answer; the engine does the work. Files are in `files`, the socket in `live`.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import anyio
import psutil
from msgspec import structs
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from comfyfleet.engine.description import object_info
from comfyfleet.engine.folders import MODEL_FOLDERS
from comfyfleet.engine.graph import PromptRefused
from comfyfleet.engine.server.answers import MAX_BODY_BYTES, bad_request, empty, json_answer, read_json
from comfyfleet.engine.server.engine import Engine
from comfyfleet.engine.server.page import page
from comfyfleet.engine.server.submit import submit

COMFYUI_VERSION = "0.3.64"  # whose protocol this is
START_LIMIT_S = 120.0
FEATURES = {"supports_preview_metadata": True, "max_upload_size": MAX_BODY_BYTES}


def engine_of(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def post_prompt(request: Request) -> Response:
    engine = engine_of(request)
    body = await read_json(request)
    if not await until_ready(engine):
        return json_answer({"error": "the render process is still starting"}, 503)
    return json_answer(submit(engine, body))


async def until_ready(engine: Engine) -> bool:
    """Wait for the first render process, which knows the nodes."""
    with anyio.move_on_after(START_LIMIT_S):
        await engine.ready.wait()
    return engine.ready.is_set()


async def get_prompt(request: Request) -> Response:
    return json_answer(engine_of(request).status())


async def get_queue(request: Request) -> Response:
    queue = engine_of(request).queue
    running, pending = [[item.listed() for item in items] for items in (queue.running, queue.pending())]
    return json_answer({"queue_running": running, "queue_pending": pending})


async def post_queue(request: Request) -> Response:
    engine, body = engine_of(request), await read_json(request)
    changed = False
    if isinstance(body, dict):
        if body.get("clear"):
            changed = engine.queue.clear()
        changed = engine.queue.delete(_ids(body)) or changed
    if changed:
        engine.tell_status()
    return empty()


def _ids(body: dict[str, Any]) -> set[str]:
    given = body.get("delete")
    return {str(name) for name in given} if isinstance(given, list) else set()


async def get_history(request: Request) -> Response:
    values: dict[str, int | None] = {"max_items": None, "offset": -1}
    for name in values:
        if name in request.query_params:
            try:
                values[name] = int(request.query_params[name])
            except ValueError:
                return bad_request(f"{name} must be a whole number.", name)
    offset = values["offset"]
    return json_answer(engine_of(request).history.page(values["max_items"], -1 if offset is None else offset))


async def get_history_of(request: Request) -> Response:
    return json_answer(engine_of(request).history.get(request.path_params["prompt_id"]))


async def post_history(request: Request) -> Response:
    history, body = engine_of(request).history, await read_json(request)
    if isinstance(body, dict):
        if body.get("clear"):
            history.clear()
        history.delete(_ids(body))
    return empty()


async def post_interrupt(request: Request) -> Response:
    """A body that names no prompt, or cannot be read, stops what runs: in ComfyUI nothing keeps an interrupt out."""
    prompt_id = None
    with contextlib.suppress(PromptRefused):
        given = await read_json(request)
        prompt_id = given.get("prompt_id") if isinstance(given, dict) else None
    await engine_of(request).interrupt(str(prompt_id) if prompt_id else None)
    return empty()


async def post_free(request: Request) -> Response:
    body = await read_json(request)
    if not isinstance(body, dict):
        return bad_request("The body must be an object.")
    unload, drop = bool(body.get("unload_models")), bool(body.get("free_memory"))
    await engine_of(request).free(unload_models=unload, free_memory=drop)
    return empty()


async def get_object_info(request: Request) -> Response:
    engine = engine_of(request)
    await until_ready(engine)
    names = [request.path_params["name"]] if "name" in request.path_params else list(engine.declarations)
    known = [engine.declarations[name] for name in names if name in engine.declarations]
    return json_answer({declaration.name: object_info(declaration, engine.folders) for declaration in known})


async def get_system_stats(request: Request) -> Response:
    engine = engine_of(request)
    if not engine.ready.is_set():
        return json_answer({"error": "the render process is still starting"}, 503)
    memory = psutil.virtual_memory()
    system = {
        "os": "posix",
        "ram_total": memory.total,
        "ram_free": memory.available,
        "comfyui_version": COMFYUI_VERSION,
        "python_version": sys.version,
        "pytorch_version": engine.torch_version,
        "embedded_python": False,
        "argv": ["comfyfleet", "engine"],
    }
    devices = [
        # A CPU's memory is the machine's, and is told as it is now; a card's as it was after the last prompt.
        structs.replace(device, vram_free=memory.available, torch_vram_free=memory.available)
        if device.type == "cpu"
        else device
        for device in engine.devices
    ]
    return json_answer({"system": system, "devices": devices})


async def get_features(request: Request) -> Response:
    return json_answer(FEATURES)


async def get_models(request: Request) -> Response:
    return json_answer(list(MODEL_FOLDERS))


async def get_models_of(request: Request) -> Response:
    folder = request.path_params["folder"]
    return json_answer(engine_of(request).folders.model_names(folder)) if folder in MODEL_FOLDERS else empty(404)


async def get_embeddings(request: Request) -> Response:
    names = engine_of(request).folders.model_names("embeddings")
    return json_answer([name.rsplit(".", 1)[0] for name in names])


async def get_nothing_listed(request: Request) -> Response:
    return json_answer([])


async def get_page(request: Request) -> Response:
    return HTMLResponse(page(engine_of(request)))


ROUTES: list[BaseRoute] = [
    Route("/", get_page),
    Route("/prompt", get_prompt),
    Route("/prompt", post_prompt, methods=["POST"]),
    Route("/queue", get_queue),
    Route("/queue", post_queue, methods=["POST"]),
    Route("/history", get_history),
    Route("/history", post_history, methods=["POST"]),
    Route("/history/{prompt_id}", get_history_of),
    Route("/interrupt", post_interrupt, methods=["POST"]),
    Route("/free", post_free, methods=["POST"]),
    Route("/object_info", get_object_info),
    Route("/object_info/{name}", get_object_info),
    Route("/system_stats", get_system_stats),
    Route("/features", get_features),
    Route("/models", get_models),
    Route("/models/{folder}", get_models_of),
    Route("/embeddings", get_embeddings),
    Route("/extensions", get_nothing_listed),
]

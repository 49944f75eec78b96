"""A ComfyUI that takes no time, for `bench.chain`: a prompt is over when its POST is answered; its picture was there.

It tells all that ComfyUI tells of a prompt, in its order, and keeps its history. What it costs is what two small HTTP
calls and the frames of a socket cost in aiohttp, as the stub that it is held against is made of the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
from aiohttp import web

from comfyfleet.testing.fake_files import FakeFiles, as_json
from comfyfleet.testing.fake_nodes import png

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_PICTURE = "instant_00001_.png"
_KINDS = {"SaveImage": "output", "PreviewImage": "temp"}


class InstantEngine:
    """The routes that a wrapper uses."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._files = FakeFiles(folders)
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._history: dict[str, dict[str, Any]] = {}
        for kind in _KINDS.values():
            (folders[kind] / _PICTURE).write_bytes(png(64, 64, 0x808080))

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/ws", self._socket)
        app.router.add_post("/prompt", self._prompt)
        app.router.add_get("/history/{prompt_id}", self._told)
        app.router.add_get("/queue", self._queue)
        self._files.add_routes(app, "")
        return app

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        name = request.query["clientId"]
        self._sockets[name] = socket
        await socket.send_json(_status(0))
        async for _ in socket:
            continue
        if self._sockets.get(name) is socket:
            del self._sockets[name]
        return socket

    async def _prompt(self, request: web.Request) -> web.Response:
        body = _decode(await request.read())
        prompt_id, graph = body["prompt_id"], body["prompt"]
        shown = {
            name: _shown(_KINDS[node["class_type"]]) for name, node in graph.items() if node["class_type"] in _KINDS
        }
        stamp = {"prompt_id": prompt_id, "timestamp": int(time.time() * 1000)}
        messages = [
            ["execution_start", stamp],
            ["execution_cached", {"nodes": [], **stamp}],
            ["execution_success", stamp],
        ]
        extra = {"client_id": body.get("client_id")}
        self._history[prompt_id] = {
            "prompt": [len(self._history), prompt_id, graph, extra, list(shown)],
            "outputs": shown,
            "status": {"status_str": "success", "completed": True, "messages": messages},
            "meta": {
                name: {"node_id": name, "display_node": name, "parent_node": None, "real_node_id": name}
                for name in shown
            },
        }
        socket = self._sockets.get(body.get("client_id", ""))
        if socket is not None:
            for frame in _frames(prompt_id, list(graph), shown, messages):
                await socket.send_str(_encode(frame).decode())
        return as_json({"prompt_id": prompt_id, "number": len(self._history), "node_errors": {}})

    async def _told(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["prompt_id"]
        entry = self._history.get(prompt_id)
        return as_json({prompt_id: entry} if entry else {})

    async def _queue(self, _request: web.Request) -> web.Response:
        return as_json({"queue_running": [], "queue_pending": []})


def _frames(
    prompt_id: str, nodes: list[str], shown: dict[str, Any], messages: list[list[Any]]
) -> Iterator[dict[str, Any]]:
    """What ComfyUI 0.3.64 sends for a prompt of which nothing was cached."""
    yield _status(1)
    yield _status(1)
    for kind, data in messages[:2]:
        yield {"type": kind, "data": data}
    states: dict[str, dict[str, Any]] = {}
    for name in nodes:
        states[name] = _state(prompt_id, name, 0.0, "running")
        yield {"type": "progress_state", "data": {"prompt_id": prompt_id, "nodes": states}}
        yield {"type": "executing", "data": {"node": name, "display_node": name, "prompt_id": prompt_id}}
        if name in shown:
            told = {"node": name, "display_node": name, "output": shown[name], "prompt_id": prompt_id}
            yield {"type": "executed", "data": told}
        states[name] = _state(prompt_id, name, 1.0, "finished")
        yield {"type": "progress_state", "data": {"prompt_id": prompt_id, "nodes": states}}
    yield {"type": messages[2][0], "data": messages[2][1]}
    yield _status(0)
    yield {"type": "executing", "data": {"node": None, "prompt_id": prompt_id}}


def _status(remaining: int) -> dict[str, Any]:
    return {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": remaining}}}}


def _state(prompt_id: str, name: str, value: float, state: str) -> dict[str, Any]:
    ids = {"node_id": name, "display_node_id": name, "real_node_id": name, "parent_node_id": None}
    return {"value": value, "max": 1.0, "state": state, "prompt_id": prompt_id, **ids}


def _shown(kind: str) -> dict[str, Any]:
    return {"images": [{"filename": _PICTURE, "subfolder": "", "type": kind}]}


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--host", default="127.0.0.1")
@click.option("--port", type=int, required=True)
@click.option("--input-dir", type=Path, required=True)
@click.option("--output-dir", type=Path, required=True)
@click.option("--temp-dir", type=Path, required=True)
def main(host: str, port: int, input_dir: Path, output_dir: Path, temp_dir: Path) -> None:
    """What else an engine is told on its command line is of no use here."""
    folders = {"input": input_dir, "output": output_dir, "temp": temp_dir}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    web.run_app(InstantEngine(folders).app(), host=host, port=port, access_log=None, print=None)


if __name__ == "__main__":
    main()

"""A ComfyUI that renders nothing: `python -m comfyfleet.testing.fake_engine --port 18188`.

It speaks ComfyUI's protocol as far as a wrapper uses it and misbehaves on demand: what ComfyUI does by itself (history
stored after the success event, a 200 with node errors, graphs that end its worker thread, one slow socket stalling all)
it does by itself; the rest is asked for at `POST /fake`, by a `FakeFault` node, or on the command line. It counts the
renders of each prompt id (`GET /fake`; `--ledger` keeps them in a file that a kill -9 does not take along).

A trivial job takes 4 ms, which is what a real ComfyUI takes for one.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import click
import msgspec
from aiohttp import WSMsgType, web
from aiohttp.typedefs import Handler

from comfyfleet.clock import Clock, SystemClock
from comfyfleet.ids import Ids, SystemIds
from comfyfleet.testing.fake_files import FEATURES, MAX_UPLOAD_BYTES, FakeFiles, as_json
from comfyfleet.testing.fake_run import FakeWorker
from comfyfleet.testing.fake_validation import problem, validate

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
# What a prompt without client id is told about: to every socket.
_TOLD_TO_ALL = frozenset({"progress", "progress_state", "execution_interrupted"})


class FakeEngine:
    """The HTTP and socket side; `run` serves until cancelled."""

    def __init__(
        self,
        *,
        output_dir: Path,
        temp_dir: Path,
        input_dir: Path,
        clock: Clock,
        ids: Ids,
        job_s: float = 0.004,
        ledger: Path | None = None,
        is_elsewhere: bool = False,
    ) -> None:
        self._ids = ids
        folders = {"output": output_dir, "temp": temp_dir, "input": input_dir}
        # A command line of another machine names folders that mean nothing here.
        self._files = FakeFiles(folders, argv=["/elsewhere/main.py"] if is_elsewhere else None)
        self._outbox: asyncio.Queue[tuple[str, str, str | None]] = asyncio.Queue()
        self.freed = 0
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._number = 0
        self._clock = clock
        self._post_500 = 0
        self._post_500_queues = False
        self._socket_delay_s = 0.0
        self._socket_silent = False
        self.worker = FakeWorker(
            emit=self._emit_from_thread,
            clock=clock,
            folders=folders,
            job_s=job_s,
            ledger=ledger,
        )

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_UPLOAD_BYTES, middlewares=[_same_origin])
        for prefix in ("", "/api"):
            app.router.add_get(f"{prefix}/ws", self._socket)
            app.router.add_get(f"{prefix}/prompt", self._prompt_info)
            app.router.add_post(f"{prefix}/prompt", self._prompt)
            app.router.add_get(f"{prefix}/queue", self._queue)
            app.router.add_post(f"{prefix}/queue", self._change_queue)
            app.router.add_post(f"{prefix}/interrupt", self._interrupt)
            app.router.add_post(f"{prefix}/free", self._free)
            app.router.add_get(f"{prefix}/history", self._all_history)
            app.router.add_get(f"{prefix}/history/{{prompt_id}}", self._history)
            app.router.add_post(f"{prefix}/history", self._change_history)
            self._files.add_routes(app, prefix)
        app.router.add_get("/fake", self._fake_counts)
        app.router.add_post("/fake", self._fake_faults)
        return app

    async def run(self, host: str, port: int) -> None:
        """Serve until cancelled."""
        self._loop = asyncio.get_running_loop()
        runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._pump)
                self.worker.start()
                await web.TCPSite(runner, host, port).start()
        finally:
            with anyio.CancelScope(shield=True):
                await runner.cleanup()

    def _emit_from_thread(self, kind: str, data: dict[str, Any], client: str | None) -> None:
        frame = _encode({"type": kind, "data": data}).decode()
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, (frame, kind, client))

    async def _pump(self) -> None:
        # One pump for all sockets: a receiver that stops reading stalls everybody, as in ComfyUI.
        while True:
            frame, kind, client = await self._outbox.get()
            if self._socket_delay_s:
                await self._clock.sleep(self._socket_delay_s)
            if self._socket_silent:
                continue
            broadcast = kind == "status" or (client is None and kind in _TOLD_TO_ALL)
            for name in list(self._sockets) if broadcast else [client]:
                socket = self._sockets.get(name or "")
                if socket is not None and not socket.closed:
                    try:
                        await socket.send_str(frame)
                    except ConnectionError:
                        self._sockets.pop(name or "", None)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=4 * 2**20)
        await socket.prepare(request)
        name = request.query.get("clientId") or self._ids.token()[:32]
        self._sockets[name] = socket
        remaining = len(self.worker.pending) + (self.worker.running is not None)
        status = {"status": {"exec_info": {"queue_remaining": remaining}}, "sid": name}
        await socket.send_json({"type": "status", "data": status})
        running = self.worker.running
        if running is not None and (running[3] or {}).get("client_id") == name:
            await socket.send_json({"type": "executing", "data": {"node": next(iter(running[2]))}})
        is_agreed = False
        async for message in socket:
            if message.type is WSMsgType.TEXT and not is_agreed:
                is_agreed = await _agree_features(socket, message.data)
        self._sockets.pop(name, None)  # also when a newer one has the name: ComfyUI's own trap
        return socket

    async def _prompt_info(self, _request: web.Request) -> web.Response:
        remaining = len(self.worker.pending) + (self.worker.running is not None)
        return as_json({"exec_info": {"queue_remaining": remaining}})

    async def _prompt(self, request: web.Request) -> web.Response:
        body = _decode(await request.read())
        if self._post_500 and not self._post_500_queues:
            self._post_500 -= 1
            return web.Response(status=500, text="500 Internal Server Error\n\nServer got itself in trouble")
        number = float(body["number"]) if "number" in body else self._number
        if "number" not in body:
            self._number += 1
            number = -number if body.get("front") else number
        if "prompt" not in body:
            return as_json({"error": problem("no_prompt", "No prompt provided"), "node_errors": {}}, 400)
        verdict = validate(body["prompt"])
        if verdict.error is not None:
            return as_json({"error": verdict.error, "node_errors": verdict.node_errors}, 400)
        extra = body.get("extra_data", {})
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        prompt_id = str(body.get("prompt_id") or self._ids.request_id())
        self.worker.put((number, prompt_id, body["prompt"], extra, verdict.good_outputs))
        if self._post_500:
            self._post_500 -= 1
            return web.Response(status=500, text="500 Internal Server Error\n\nServer got itself in trouble")
        return as_json({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})

    async def _queue(self, _request: web.Request) -> web.Response:
        running = self.worker.running
        return as_json({"queue_running": [running] if running else [], "queue_pending": list(self.worker.pending)})

    async def _change_queue(self, request: web.Request) -> web.Response:
        body = _decode(await request.read())
        if body.get("clear"):
            self.worker.delete([item[1] for item in self.worker.pending])
        self.worker.delete(body.get("delete", []))
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        prompt_id = None
        with contextlib.suppress(msgspec.DecodeError):
            prompt_id = _decode(await request.read()).get("prompt_id")
        self.worker.interrupt(prompt_id)
        return web.Response()

    async def _free(self, request: web.Request) -> web.Response:
        if _decode(await request.read()).get("free_memory"):
            self.worker.free()
        self.freed += 1
        return web.Response()

    async def _change_history(self, request: web.Request) -> web.Response:
        body = _decode(await request.read())
        with self.worker.changed:
            for prompt_id in list(self.worker.history) if body.get("clear") else body.get("delete", []):
                self.worker.history.pop(prompt_id, None)
        return web.Response()

    async def _all_history(self, request: web.Request) -> web.Response:
        entries = list(self.worker.history.items())
        if "max_items" in request.query:
            entries = entries[-int(request.query["max_items"]) :]
        return as_json(dict(entries))

    async def _history(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["prompt_id"]
        entry = self.worker.history.get(prompt_id)
        return as_json({prompt_id: entry} if entry else {})

    async def _fake_counts(self, _request: web.Request) -> web.Response:
        return as_json({"renders": self.worker.renders, "freed": self.freed})

    async def _fake_faults(self, request: web.Request) -> web.Response:
        """{"oom": 1} strikes the next prompt (`FakeWorker.faults`); the other fields say how HTTP and socket behave."""
        asked = _decode(await request.read())
        self._post_500 = int(asked.pop("post_500", self._post_500))
        self._post_500_queues = bool(asked.pop("post_500_queues", self._post_500_queues))
        self._socket_delay_s = float(asked.pop("socket_delay_s", self._socket_delay_s))
        self._socket_silent = bool(asked.pop("socket_silent", self._socket_silent))
        self.worker.history_late_s = float(asked.pop("history_late_s", self.worker.history_late_s))
        if asked.pop("drop_sockets", False):
            for socket in list(self._sockets.values()):
                await socket.close()
        self.worker.faults.update({name: int(count) for name, count in asked.items()})
        return as_json({})


async def _agree_features(socket: web.WebSocketResponse, text: str) -> bool:
    """The first object that parses may name features; True when this was one."""
    try:
        message = _decode(text)
    except msgspec.DecodeError:
        return False
    if not isinstance(message, dict):
        return False
    if message.get("type") == "feature_flags":
        await socket.send_json({"type": "feature_flags", "data": FEATURES})
    return True


@web.middleware
async def _same_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """ComfyUI's own check: on a loopback name, Origin must be Host."""
    origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
    if origin and urlsplit(origin).netloc.lower() != host.lower():
        return web.Response(status=403)
    return await handler(request)


@click.command()
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=18188)
@click.option("--models-dir", type=Path, help="Accepted and not used: the embedded engine's arguments fit.")
@click.option("--miniatures-dir", type=Path, help="Accepted and not used.")
@click.option("--device", default="cpu", help="Accepted and not used.")
@click.option("--input-dir", type=Path, required=True)
@click.option("--output-dir", type=Path, required=True)
@click.option("--temp-dir", type=Path, required=True)
@click.option("--job-s", default=0.004, help="Seconds that a job of plain nodes takes.")
@click.option("--ledger", type=Path, help="A file that gets a line at each render's start and end.")
@click.option("--elsewhere", is_flag=True, help="As on another machine: nobody can see its folders.")
def main(
    host: str,
    port: int,
    models_dir: Path | None,
    miniatures_dir: Path | None,
    device: str,
    input_dir: Path,
    output_dir: Path,
    temp_dir: Path,
    job_s: float,
    ledger: Path | None,
    elsewhere: bool,
) -> None:
    """A ComfyUI that renders nothing, for tests of whatever stands in front of one."""
    for folder in (input_dir, output_dir, temp_dir):
        folder.mkdir(parents=True, exist_ok=True)
    engine = FakeEngine(
        output_dir=output_dir,
        temp_dir=temp_dir,
        input_dir=input_dir,
        clock=SystemClock(),
        ids=SystemIds(),
        job_s=job_s,
        ledger=ledger,
        is_elsewhere=elsewhere,
    )
    anyio.run(engine.run, host, port, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
